"""Measure TTFT and decoding against the unpatched library. Not a test.

    python tests/bench/measure_speed.py MODEL.gguf --unpatched FOLDER [--skips 1/4,1/3] [--pairs 9]

FOLDER contains upstream's libllama of the same release and flags, built with
`CMAKE_ARGS=-DCOLD_FLAGS= python patches/llama-cpp-python/tool.py unpatched FOLDER`. The tests'
build of libllama is less optimized, so the program rejects it. --other FOLDER is another build of
the patched library instead, such as a wheel's. Two child processes stay open, on one core and one
thread: one with the unpatched library and llama_cpp's own `Llama.generate`, one with the patched
library and PopModel. In each round, every variant runs once, in a rotating order; ratios are
computed within the round. A model with exact skipping is measured without boundaries. Row counters
of the patched runs prove that the whole prompt was evaluated, and count pruned rows. Decoding
follows a prompt of 16 tokens; llama-bench's `tg` has no prompt (give its path with --llama-bench).
If other work runs, `--clock cpu` takes the process's CPU time, which is comparable with one thread.

Prints tables and, last, one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.architecture.work import Macs, speedup_limit
from pop_converter.gguf.source import read_source
from pop_local.engine.llama.graph_macs import GraphMacs

N_DECODE_PROMPT = 16
TOOL = Path(__file__).parents[2] / "patches" / "llama-cpp-python" / "tool.py"
FAST_BUILD = {"POP_LLAMA_CPP_UNPATCHED": "1", "CMAKE_ARGS": "-DCOLD_FLAGS="}


@dataclass(frozen=True)
class Variant:
    """A prompt's run; `mode` is the backend's, 0 for all layers; `boundary` 0: the file's."""

    name: str
    is_patched: bool
    mode: int = 0
    boundary: int = 0


@dataclass(frozen=True)
class Spread:
    """Median and extremes of a figure over all rounds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Row:
    """`speedup`: against the patched library's full mode; `speedup_unpatched`: against upstream.
    `n_pruned`: rows that skipped layers, exactly or not."""

    n_prompt: int
    variant: str
    n_pruned: int
    ttft_s: float
    speedup: Spread
    speedup_unpatched: Spread
    limit: float
    of_limit: float


# --- the child


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Callable[[], float]


def child(options: argparse.Namespace) -> None:
    """Answer each JSON line with another until the input ends."""
    open_runner = _patched if options.child == "patched" else _unpatched
    runner = open_runner(options, CLOCKS[options.clock])
    for line in sys.stdin:
        print(json.dumps(runner(**json.loads(line))), flush=True)


def _patched(options: argparse.Namespace, clock: Clock) -> Any:
    from pop_local.engine.engine_options import EngineOptions
    from pop_local.engine.llama.backend import Mode
    from pop_local.engine.model import PopModel
    from pop_local.engine.prompt.prompt import Prompt
    from pop_local.measure.speed import run

    on = {"sidecar": options.sidecar, "n_threads": options.threads, "n_gpu_layers": 0}
    opened = PopModel(EngineOptions.of(options.model, n_ctx=options.ctx, **on))

    def runner(tokens: list[int], n_decode: int, mode: int, boundary: int) -> dict[str, float]:
        if boundary:
            opened.engine.sequences[0].set_boundary(boundary)
        done = run(opened, Mode(mode), Prompt(tokens), n_decode, clock)
        rows = done.read.counters
        return {
            "ttft_s": done.ttft_s,
            "decode": done.decode_tokens_per_s,
            "n_pruned": rows.n_context + rows.n_exact,
        }

    return runner


def _unpatched(options: argparse.Namespace, clock: Clock) -> Any:
    import llama_cpp

    assert not hasattr(llama_cpp.llama_cpp._lib, "llama_pop_abi"), "this library is patched"
    on = {"n_threads": options.threads, "n_threads_batch": options.threads, "n_gpu_layers": 0}
    opened = llama_cpp.Llama(options.model, n_ctx=options.ctx, verbose=False, **on)

    def runner(tokens: list[int], n_decode: int, mode: int, boundary: int) -> dict[str, float]:
        opened.reset()
        opened._ctx.kv_cache_clear()
        sampled = opened.generate(tokens, temp=0.0)
        started_s = clock()
        next(sampled)
        first_s = clock()
        for _ in range(n_decode):
            next(sampled)
        decoded_s = clock()
        return {
            "ttft_s": first_s - started_s,
            "decode": n_decode / (decoded_s - first_s),
            "n_pruned": 0,
        }

    return runner


# --- the parent


class Child:
    """A process that measures."""

    def __init__(self, options: argparse.Namespace, n_ctx: int, library: Path | None) -> None:
        environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(library)} if library else {})
        is_patched = library is None or library == options.other
        arguments = [options.model, "--child", "patched" if is_patched else "unpatched"]
        arguments += ["--clock", options.clock, "--threads", str(options.threads)]
        arguments += ["--sidecar", str(options.sidecar)] if options.sidecar else []
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--ctx", str(n_ctx)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if options.cpu is not None:
            os.sched_setaffinity(self._process.pid, {options.cpu})

    def run(self, tokens: list[int], n_decode: int, variant: Variant) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"tokens": tokens, "n_decode": n_decode, "mode": variant.mode}
        request["boundary"] = variant.boundary
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a child process ended; run again with --verbose")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def children(options: argparse.Namespace, n_ctx: int) -> Iterator[dict[bool, Child]]:
    opened = {
        False: Child(options, n_ctx, options.other or options.unpatched),
        True: Child(options, n_ctx, None),
    }
    try:
        yield opened
    finally:
        for process in opened.values():
            process.close()


Runs = dict[Variant, list[dict[str, float]]]


def measure(
    pair: dict[bool, Child], variants: list[Variant], tokens: list[int], n_decode: int, rounds: int
) -> Runs:
    """Return the runs of each variant, by round; the first round only warms up."""
    runs: Runs = {variant: [] for variant in variants}
    for number in range(rounds + 1):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            done = pair[variant.is_patched].run(tokens, n_decode, variant)
            if number > 0:
                runs[variant].append(done)
        show(f"\r{len(tokens)} tokens: round {number} of {rounds} ", end="")
    show("\r" + " " * 40 + "\r", end="")
    return runs


def show(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], key: str) -> Spread:
    return spread([a[key] / b[key] for a, b in zip(above, below, strict=True)])


def spread(values: list[float]) -> Spread:
    return Spread(float(np.median(values)), min(values), max(values))


def ttft_rows(runs: Runs, macs: Macs, exact: int, n_prompt: int) -> list[Row]:
    unpatched, full, *pruned = runs.items()
    rows = []
    for variant, done in [unpatched, full, *pruned]:
        n_pruned = int(done[0]["n_pruned"])
        limit = 1.0
        if variant.boundary:
            limit = speedup_limit(macs, n_prompt, variant.boundary, n_prompt - n_pruned)
        elif variant.mode:
            limit = speedup_limit(macs, n_prompt, exact, 1)
        speedup = ratio(full[1], done, "ttft_s")
        rows.append(
            Row(
                n_prompt=n_prompt,
                variant=variant.name,
                n_pruned=n_pruned,
                ttft_s=float(np.median([one["ttft_s"] for one in done])),
                speedup=speedup,
                speedup_unpatched=ratio(unpatched[1], done, "ttft_s"),
                limit=limit,
                of_limit=speedup.median / limit,
            )
        )
    return rows


def print_rows(rows: list[Row]) -> None:
    print("| prompt | variant | pruned | TTFT s | vs patched full | vs unpatched | limit | of it |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.n_prompt} | {row.variant} | {row.n_pruned} | {row.ttft_s:.3f}"
            f" | {shown(row.speedup)} | {shown(row.speedup_unpatched)}"
            f" | {row.limit:.3f} | {row.of_limit:.1%} |"
        )


def shown(value: Spread, digits: int = 3) -> str:
    return f"{value.median:.{digits}f} ({value.min:.{digits}f}-{value.max:.{digits}f})"


def measure_decode(
    pair: dict[bool, Child], variants: list[Variant], options: argparse.Namespace, n_vocab: int
) -> dict[str, Any]:
    both = [variants[0], variants[-1]]
    tokens = prompt(n_vocab, N_DECODE_PROMPT)
    bench = [llama_bench(options)]
    runs = measure(pair, both, tokens, options.decode, options.pairs)
    bench.append(llama_bench(options))
    ours, theirs = runs[both[1]], runs[both[0]]
    found = {
        "n_decode": options.decode,
        "engine_tokens_per_s": float(np.median([one["decode"] for one in ours])),
        "llama_cpp_tokens_per_s": float(np.median([one["decode"] for one in theirs])),
        "engine_to_llama_cpp": asdict(ratio(ours, theirs, "decode")),
        "llama_bench_tokens_per_s": bench,
    }
    print(
        f"\ndecoding {options.decode} tokens: engine {found['engine_tokens_per_s']:.1f} tokens/s,"
        f" llama_cpp's generate on the unpatched library {found['llama_cpp_tokens_per_s']:.1f},"
        f" ratio {shown(ratio(ours, theirs, 'decode'))}; llama-bench tg before and after: {bench}"
    )
    return found


def llama_bench(options: argparse.Namespace) -> float | None:
    if options.llama_bench is None:
        return None
    command = [options.llama_bench, "-m", options.model, "-p", "0", "-n", str(options.decode)]
    prefix = [] if options.cpu is None else ["taskset", "-c", str(options.cpu)]
    done = subprocess.run(
        [*prefix, *command, "-t", "1", "-r", "3", "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout)[0]["avg_ts"])


def prompt(n_vocab: int, n_prompt: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(0, n_vocab, n_prompt).tolist()
    return tokens


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return (
        f"{model}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}"
    )


def skipping(shape: ModelShape, skips: str) -> list[Variant]:
    if shape.exact:
        return [Variant(f"exact from {shape.exact}", is_patched=True, mode=1)]
    shares = map(Fraction, skips.split(","))
    boundaries = [shape.n_layer - int(shape.n_layer * s + Fraction(1, 2)) for s in shares]
    return [Variant(f"boundary {b}", is_patched=True, mode=1, boundary=b) for b in boundaries]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--unpatched", type=Path, help="folder of upstream's libraries")
    parser.add_argument("--other", type=Path, help="folder of another build of the patched ones")
    parser.add_argument("--prompts", default="512,1024,2048,4096")
    parser.add_argument("--skips", default="1/4,1/3,1/2", help="shares of the layers")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--decode", type=int, default=128, help="tokens to decode; 0: none")
    parser.add_argument("--cpu", type=int, help="pin the children to this CPU")
    parser.add_argument("--llama-bench", help="path of llama-bench")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--child", choices=["patched", "unpatched"], help=argparse.SUPPRESS)
    parser.add_argument("--ctx", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--sidecar", help=argparse.SUPPRESS)
    return parser.parse_args()


def require_fast_build(folder: Path) -> None:
    """Exit unless `folder` contains upstream's libraries built with FAST_BUILD."""
    command, env = [sys.executable, str(TOOL), "key"], os.environ | FAST_BUILD
    key = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    stamp = folder / "key"
    if not stamp.is_file() or stamp.read_text() != key.strip():
        raise SystemExit(
            f"{folder} is outdated or was built with fewer optimizations. Rebuild it:"
            f" `CMAKE_ARGS=-DCOLD_FLAGS= python {TOOL} unpatched {folder}`."
        )


def main() -> None:
    options = parsed()
    if options.child:
        child(options)
        return
    if options.unpatched:
        require_fast_build(options.unpatched)
    shape, macs = source_shape(read_source(Path(options.model))), GraphMacs(Path(options.model))
    n_prompts = [int(n) for n in options.prompts.split(",") if n]
    variants = [
        Variant("other" if options.other else "unpatched", is_patched=False),
        Variant("full", is_patched=True),
        *skipping(shape, options.skips),
    ]
    decoding = variants if shape.exact else variants[:2]
    print(f"{options.model}: {machine()}, 1 thread, {options.pairs} rounds, {options.clock} time\n")
    rows: list[Row] = []
    with children(options, max([*n_prompts, options.decode]) + 64) as pair:
        for n_prompt in n_prompts:
            runs = measure(pair, variants, prompt(shape.n_vocab, n_prompt), 1, options.pairs)
            rows += ttft_rows(runs, macs, shape.exact, n_prompt)
        print_rows(rows)
        decode = measure_decode(pair, decoding, options, shape.n_vocab) if options.decode else {}
    result = {"model": options.model, "machine": machine(), "ttft": [asdict(row) for row in rows]}
    print(json.dumps(result | {"decode": decode}))


if __name__ == "__main__":
    main()
