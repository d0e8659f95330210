"""Measure the first prompt after a restart, restored from disk or read again. Not a test.

    python tests/bench/measure_cold.py MODEL.gguf [--tokens 6000] [--repeat 3] [--threads 1]

Reads a prompt, stores its KV cache in a temporary folder, and closes the model. Then opens the
model again and reads the prompt with a short question, alternately with this folder and with an
empty one. Prints a row of JSON with the seconds to open, read and write, and the largest file.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import text_prompt

CAPACITY_BYTES = 2**34


def read_once(options: argparse.Namespace, folder: Path, question: str) -> dict[str, float]:
    """Open the model, read the prompt and a question, and store both in a folder."""
    prompts = PromptCache(0, DiskStore(folder, CAPACITY_BYTES))
    n_ctx = options.tokens + 256
    started_s = time.perf_counter()
    with PopModel.open(
        options.model, n_ctx=n_ctx, n_threads=options.threads, prompt_cache=prompts
    ) as model:
        opened_s = time.perf_counter()
        asked = model.engine.context.vocabulary.tokenize(question)
        prompt = Prompt([*text_prompt(model, options.tokens).tokens, *asked])
        tokenized_s = time.perf_counter()
        read = model.read(prompt)
        read_s = time.perf_counter() - tokenized_s
        model.engine.states.store()
        stored_s = time.perf_counter()
        prompts.close()
    return {
        "open_s": opened_s - started_s,
        "read_s": read_s,
        "write_s": time.perf_counter() - stored_s,
        "n_cached": read.n_cached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        written = read_once(options, Path(kept), "")
        ways: dict[str, list[dict[str, float]]] = {"restored": [], "read": []}
        for turn in range(options.repeat):
            ways["restored"].append(read_once(options, Path(kept), f" What is {turn}?"))
            with tempfile.TemporaryDirectory() as empty:
                ways["read"].append(read_once(options, Path(empty), f" What is {turn}?"))
        size_bytes = max(file.stat().st_size for file in Path(kept).iterdir())
    row: dict[str, object] = {"write_s": written["write_s"], "size_bytes": size_bytes}
    for name, runs in ways.items():
        times = [each["read_s"] for each in runs]
        row[name] = {
            "seconds": statistics.median(times),
            "range": [min(times), max(times)],
            "open_s": statistics.median(each["open_s"] for each in runs),
            "n_cached": runs[0]["n_cached"],
        }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
