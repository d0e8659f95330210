"""How long threads of llama.cpp should spin before they sleep: alone, and beside other work.

    python tests/bench/measure_threads.py MODEL --spins none,0,1000,30000 --busy 1 --rounds 5
Each round reads and decodes once with each of the spins, in a process of its own (libgomp looks at
GOMP_SPINCOUNT as it is loaded; none leaves it to libgomp), beside --busy processes that compute,
the first of them on the last CPU. Medians of the rounds, and their extremes; processor seconds are
those of all threads. --fifo lets the threads go before everything else on this machine (Linux,
root): then it is a quiet one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FIGURES = ("prefill_s", "decode_s", "cpu_s")


def child(model: str, n_prompt: int, n_decode: int, n_threads: int, fifo: bool) -> None:
    """One line of JSON: seconds of a prefill, of a decode, and of the processor in both."""
    from pop_local.engine.model import PopModel

    if fifo:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    with PopModel(Path(model), n_ctx=n_prompt + n_decode + 64, n_threads=n_threads) as opened:
        rng = np.random.default_rng(0)
        tokens: list[int] = rng.integers(3, opened.n_vocab(), n_prompt).tolist()
        next(opened.generate(tokens[:64], temp=0.0))
        opened.clear()
        cpu, start = time.process_time(), time.perf_counter()
        sampled = opened.generate(tokens, temp=0.0)
        next(sampled)
        read = time.perf_counter()
        for _ in range(n_decode):
            next(sampled)
        end = time.perf_counter()
    print(json.dumps((read - start, end - read, time.process_time() - cpu)))


def busy(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    parent = os.getppid()
    while os.getppid() == parent:
        np.dot(np.ones(64), np.ones(64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--spins", default="none,0")
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fifo", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at is not None:
        busy(options.at)
    if options.child:
        child(options.model, options.prompt, options.decode, options.threads, options.fifo)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    cpus = sorted(os.sched_getaffinity(0), reverse=True)
    others = [
        subprocess.Popen([*command, "--at", str(cpus[i % len(cpus)])]) for i in range(options.busy)
    ]
    found: dict[str, list[list[float]]] = {spins: [] for spins in options.spins.split(",")}
    try:
        for _ in range(options.rounds):
            for spins, runs in found.items():
                given = {} if spins == "none" else {"GOMP_SPINCOUNT": spins}
                run = [*command, "--child"]
                done = subprocess.run(
                    run, env=os.environ | given, check=True, stdout=subprocess.PIPE
                )
                runs.append(json.loads(done.stdout))
    finally:
        for other in others:
            other.kill()
    print(f"{'spins':>10}" + "".join(f"{name:>24}" for name in FIGURES))
    for spins, runs in found.items():
        of = zip(*runs, strict=True)
        shown = (f"{statistics.median(o):8.3f} ({min(o):.3f}-{max(o):.3f})".rjust(24) for o in of)
        print(f"{spins:>10}" + "".join(shown))


if __name__ == "__main__":
    main()
