"""Measure the choice of kernels: the cost of a first opening, and choices on a busy machine.

    python tests/bench/measure_choice.py MODEL.gguf [--pairs 20] [--runs 100] [--burners 2]

Opens the model in new processes, alternately with an empty cache folder and with the timings that
the preceding process stored. Then measures kinds of operations, each time with an empty folder. The
burners are busy loops on this program's CPUs. Prints one line of JSON. Requires Linux. Not a test.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pop_local.engine.llama import kernel_choice
from pop_local.engine.model import PopModel

KINDS = " ".join(["attention", *map(str, range(40))])


def open_once(model: str, threads: int) -> None:
    """Open the model, and print the wall-clock time and the CPU time in seconds."""
    started_s, cpu_s = time.perf_counter(), time.process_time()
    with PopModel.open(model, n_ctx=1024, n_threads=threads):
        print(json.dumps([time.perf_counter() - started_s, time.process_time() - cpu_s]))


def opened_in_a_process(options: argparse.Namespace, folder: str) -> list[float]:
    command = [sys.executable, __file__, options.model, "--threads", str(options.threads), "--once"]
    env = os.environ | {"XDG_CACHE_HOME": folder}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


def openings(options: argparse.Namespace) -> dict[str, object]:
    """Return how much more time the first openings took than the second ones."""
    extra: list[list[float]] = []
    seconds: list[float] = []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            first, second = (opened_in_a_process(options, folder) for _ in range(2))
        seconds.append(second[0])
        extra.append([one - other for one, other in zip(first, second, strict=True)])
    row: dict[str, object] = {"open_s": statistics.median(seconds)}
    for name, costs in zip(("extra_s", "extra_cpu_s"), zip(*extra, strict=True), strict=True):
        row[name] = {"median": statistics.median(costs), "max": max(costs)}
    return row


def choices(options: argparse.Namespace) -> dict[str, object]:
    """Return how often each kind was chosen, the number of decided kinds, and the longest time."""
    chosen: Counter[str] = Counter()
    n_decided, longest_s = 0, 0.0
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            started_s = time.perf_counter()
            choice, *times = kernel_choice.measured(options.kinds, options.threads)
            longest_s = max(longest_s, time.perf_counter() - started_s)
            chosen.update(choice.split())
            n_decided += len(times)
    return {"chosen": chosen, "n_decided": n_decided, "longest_s": longest_s}


@contextmanager
def burning(n: int) -> Iterator[None]:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for each in burners:
            each.kill()
            each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--burners", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", default=KINDS, help="numbers of ggml types, or attention")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.pop(kernel_choice.VARIABLE, None)
    if options.once:
        open_once(str(Path(options.model)), options.threads)
        return
    with burning(options.burners):
        print(json.dumps({**openings(options), **choices(options)}))


if __name__ == "__main__":
    main()
