"""Time to read a prompt in full, pruned, with a selection, each in its own process. Not a test.

    python tests/bench/measure_fresh.py MODEL.gguf --sidecar PATH [--prompts 512,2048]
        [--select 0.1] [--rounds 3]

On processors with AMX a full reading takes up to half as long again once the same context has read
with fewer rows (docs/notebook), which flatters pairs in one process. Here each process reads
the prompt twice in one way, and the second time counts. One thread. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.speed import random_prompt, spread

WAYS = ("full", "pruned", "selected")


def read(way: str, model: str, sidecar: str, n_prompt: int, select: float) -> float:
    opened = PopModel(model, sidecar=sidecar, n_ctx=n_prompt + 16, n_threads=1)
    opened.set_mode(Mode.OFF if way == "full" else Mode.CONTEXT)
    opened.set_depth(select if way == "selected" else 0.0)
    prompt = random_prompt(opened, n_prompt)
    took_s = 0.0
    for _ in range(2):
        opened.cache.clear()
        started_s = time.perf_counter()
        opened.read(prompt)
        took_s = time.perf_counter() - started_s
    return took_s


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(read(*json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--sidecar", type=Path, required=True)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--select", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| prompt | full s | full / pruned | full / selected |\n|---:|---:|---:|---:|")
    for n_prompt in map(int, given.prompts.split(",")):
        took_s: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                asked = json.dumps(
                    [way, str(given.model), str(given.sidecar), n_prompt, given.select]
                )
                command = [sys.executable, __file__, "--child", asked]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took_s[way].append(float(done.stdout))
        full = spread(took_s["full"])
        cells = [f"{full.median:.3f} ({full.min:.3f}-{full.max:.3f})"]
        for way in WAYS[1:]:
            of = spread(a / b for a, b in zip(took_s["full"], took_s[way], strict=True))
            cells.append(f"{of.median:.2f}x ({of.min:.2f}-{of.max:.2f})")
        print(f"| {n_prompt} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
