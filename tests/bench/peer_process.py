"""Measure an inference engine that is a Python package, in another process. Not a test.

    PYTHON tests/bench/peer_process.py openvino|mistralrs MODEL.gguf --threads 1 --clock wall

measure_peers.py starts this program with an interpreter whose environment contains the engine. The
program imports only the engine and the standard library. It first prints one JSON object: what the
engine reports about itself, or an `error`. Then it answers each JSON line, {"n_prompt": 512,
"n_new": 1}, with the seconds that the engine needed and the numbers of tokens that it counted.

Prefix caches are off, decoding is greedy, and an end token does not stop an answer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
N_FIRST_IDS = 10_000  # every model's vocabulary contains them

Counts = tuple[int, int]  # tokens of the prompt and of the answer, as the engine counted them
Prepare = Callable[[int, int], Callable[[], Counts]]  # by numbers of tokens; the result generates


class PeerError(Exception):
    """An engine that cannot open a model, or that computed something else than requested."""


class PeerProcess:
    """A process with an opened engine. Raises PeerError if the engine cannot open the model."""

    def __init__(self, python: Path, kind: str, options: argparse.Namespace) -> None:
        threads = str(options.threads)
        # mistralrs takes its number of threads from the environment.
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        arguments = [kind, options.model, "--threads", threads, "--clock", options.clock]
        self._process = subprocess.Popen(
            [python, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def seconds(self, n_prompt: int, n_new: int) -> float:
        """Return the seconds for a prompt and `n_new` tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"n_prompt": n_prompt, "n_new": n_new}) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        if (found["n_prompt"], found["n_new"]) != (n_prompt, n_new):
            raise PeerError(f"{n_prompt} and {n_new} tokens requested, the engine counted {found}")
        return float(found["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if error := found.get("error"):
            self.close()
            raise PeerError(error)
        return found


# --- the child


def openvino(options: argparse.Namespace) -> tuple[dict[str, Any], Prepare]:
    """Open a model with OpenVINO GenAI. The scheduler's limits are the pipeline's own."""
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 1 << 16
    pipeline = genai.LLMPipeline(
        options.model,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=options.threads,
    )
    core = ov.Core()
    about = {"version": version("openvino-genai")}
    for name in (
        "INFERENCE_PRECISION_HINT",
        "KV_CACHE_PRECISION",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    ):
        about[name.lower()] = str(core.get_property("CPU", name))

    def prepare(n_prompt: int, n_new: int) -> Callable[[], Counts]:
        ids = random.Random(1).choices(range(N_FIRST_IDS), k=n_prompt)
        tensor = ov.Tensor(_int64_array([ids]))
        config = genai.GenerationConfig()
        config.max_new_tokens = n_new
        config.ignore_eos = True
        config.do_sample = False

        def run() -> Counts:
            done = pipeline.generate(tensor, config)
            return done.perf_metrics.get_num_input_tokens(), len(done.tokens[0])

        return run

    return about, prepare


def _int64_array(rows: list[list[int]]) -> Any:
    import numpy as np

    return np.array(rows, dtype=np.int64)


def mistralrs(options: argparse.Namespace) -> tuple[dict[str, Any], Prepare]:
    """Open a model with mistral.rs, which takes text: prompts repeat a word of one token."""
    from mistralrs import (  # type: ignore[import-not-found]
        CompletionRequest,
        Runner,
        Which,
    )

    path = Path(options.model).resolve()
    which = Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    runner = Runner(which, prefix_cache_n=0, token_source="none")

    def request_of(n_words: int, n_new: int) -> Any:
        return CompletionRequest(
            prompt=" the" * n_words,
            model="default",
            max_tokens=n_new,
            ignore_eos=True,
            temperature=0.0,
        )

    # The tokenizer's own count can include a start token that a request lacks.
    n_added = runner.send_completion_request(request_of(8, 1)).usage.prompt_tokens - 8

    def prepare(n_prompt: int, n_new: int) -> Callable[[], Counts]:
        request = request_of(n_prompt - n_added, n_new)

        def run() -> Counts:
            usage = runner.send_completion_request(request).usage
            return usage.prompt_tokens, usage.completion_tokens

        return run

    return {"version": version("mistralrs")}, prepare


ENGINES = {"openvino": openvino, "mistralrs": mistralrs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    # Engines log to stdout, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        about, prepare = ENGINES[options.engine](options)
    except BaseException as error:  # an engine's panic is not an Exception
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer(about)
    clock = CLOCKS[options.clock]
    for line in sys.stdin:
        request = json.loads(line)
        run = prepare(request["n_prompt"], request["n_new"])
        started_s = clock()
        n_prompt, n_new = run()
        seconds = clock() - started_s
        answer({"seconds": seconds, "n_prompt": n_prompt, "n_new": n_new})


if __name__ == "__main__":
    main()
