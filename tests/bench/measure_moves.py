"""Measure the CPU time and the memory of moving cached rows after an edit. Not a test.

    python tests/bench/measure_moves.py MODEL.gguf [--tokens 6000] [--parallel 1]

Reads random tokens, then inserts 10 tokens at the start, in the middle, and before the last 100
tokens, and removes them again. The new tokens are not decoded. For each place, prints the number of
moved rows, the median CPU time of a move, and the growth of resident memory during the first move.
Requires Linux and glibc.
"""

import argparse
import ctypes
import time
from pathlib import Path

import numpy as np

from pop_local.engine.cache.kv_cache import KvCache, move_rows
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt

N_NEW = 10
N_LAST = 100
N_MOVES = 10  # an even number, so that all new tokens are removed again


def memory(key: str) -> int:
    """Return a value in kB from the process's status."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0])


def move(cache: KvCache, at: int, *, inserts: bool) -> tuple[float, int]:
    """Insert or remove N_NEW tokens. Return the CPU time in seconds and the growth in kB."""
    rows = np.arange(cache.n_tokens, dtype=np.int32)
    new = np.full(N_NEW if inserts else 0, -1, np.int32)
    sources = np.concatenate([rows[:at], new, rows[at + (0 if inserts else N_NEW) :]])
    tokens = cache.tokens[sources]
    ctypes.CDLL(None).malloc_trim(0)  # otherwise, memory that earlier moves freed hides the growth
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    started_s = time.process_time()
    if not move_rows(cache, tokens, sources):
        raise SystemExit("llama.cpp cannot move this model's rows")
    seconds = time.process_time() - started_s
    growth = memory("VmHWM") - before
    cache.n_tokens = len(sources)
    return seconds, growth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--parallel", type=int, default=1, help="number of sequences")
    options = parser.parse_args()
    n = options.tokens
    opened = EngineOptions.of(
        options.model, n_ctx=n + 2192, n_parallel=options.parallel, n_threads=1, n_gpu_layers=0
    )
    print("| tokens inserted | rows moved | CPU time in ms | growth in MB |")
    print("|---|---:|---:|---:|")
    with PopModel(opened) as model:
        sequence = model.engine.sequences[0]
        n_vocab = model.engine.context.vocabulary.n_tokens
        tokens = np.random.default_rng(0).integers(3, n_vocab, n).tolist()
        sequence.read(Prompt(tokens))
        places = {"at the start": 0, "in the middle": n // 2, f"{N_LAST} from the end": n - N_LAST}
        for name, at in places.items():
            moves = [move(sequence.cache, at, inserts=i % 2 == 0) for i in range(N_MOVES)]
            cpu_ms = 1e3 * float(np.median([seconds for seconds, _ in moves]))
            print(f"| {name} | {n - at:,} | {cpu_ms:.1f} | {moves[0][1] / 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
