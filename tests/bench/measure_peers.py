"""Measure speed next to llama.cpp, ik_llama.cpp, OpenVINO GenAI, and mistral.rs. Not a test.

    python tests/bench/measure_peers.py MODEL.gguf [--llama PATH] [--ik PATH] [--openvino PYTHON]
        [--mistralrs PYTHON] [--sidecar FILE] [--prompts 512,2048] [--decode 32] [--threads 1]
        [--rounds 3] [--clock wall|cpu] [--no-flash-attention] [--json]

Each PATH is a built `llama-bench` with its libraries in the same folder; an option may come twice.
Each PYTHON is the interpreter of an environment that contains the engine (`pip install
openvino-genai`, `pip install mistralrs`). This program builds and installs none of them. In each
round, every setting runs once, in a rotating order. A llama-bench runs in a new process for each of
its SETTINGS; a Python engine (peer_process.py) and pop-local, in full and pruned, stay open in one
child process each. Pruning uses the sidecar, else each of `--skips`, or exact skipping if the model
allows it. An engine that cannot open the model is listed with its message.

Speeds are prompt tokens per second. Ours and those of the Python engines include sampling the first
token, and row counters prove the number of pruned rows. A ratio is computed within a round, to the
peer's setting with the best median at that length. With --decode N, N tokens are decoded, too,
listed as prompt 0: a llama-bench's without a prompt, all others' after a prompt of 16 tokens. All
warm up first. Pin with `taskset`. Prints a table, or one JSON object.

If other work runs, `--clock cpu` takes the processes' CPU time, which is comparable with one
thread. A llama-bench reports only wall time. Its CPU time is the difference between a process with
the prompt and a process with 16 tokens. For decoding, the second process decodes five times.
"""

import argparse
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from measure_speed import (
    CLOCKS,
    N_DECODE_PROMPT,
    Child,
    Spread,
    Variant,
    machine,
    prompt,
    show,
    shown,
    skipping,
    spread,
)
from peer_process import ENGINES, PeerError, PeerProcess
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source

SETTINGS = {
    "llama": ("-fa 1 --repack 1", "-fa 0 --repack 1", "-fa 1 --repack 0", "-fa 0 --repack 0"),
    "ik": ("-fa 1 -rtr 0", "-fa 1 -rtr 1"),
}


@dataclass(frozen=True)
class Read:
    """A prompt's prefill, or a decode run."""

    tokens_per_s: float
    n_pruned: int = 0


N_FEW = 16
DECODED = 0  # listed as a prompt length, as in llama-bench
Reads = dict[int, Read]  # by prompt length
Run = Callable[[], Reads]


@dataclass(frozen=True)
class Entry:
    """A program in one setting; `peer` is empty for ours."""

    name: str
    peer: str
    run: Run


@dataclass(frozen=True)
class Row:
    """Tokens/s at one prompt length, or DECODED. `to_peers`: ratios to the best setting of each."""

    n_prompt: int
    name: str
    n_pruned: int
    tokens_per_s: Spread
    to_peers: dict[str, Spread]


def peers(options: argparse.Namespace) -> list[Entry]:
    """Return each given llama-bench in each of its settings."""
    entries = []
    for kind, settings in SETTINGS.items():
        programs: list[Path] = getattr(options, kind)
        if not options.flash_attention:
            settings = tuple(dict.fromkeys(each.replace("-fa 1", "-fa 0") for each in settings))
        for program in programs:
            peer = kind if len(programs) == 1 else f"{kind} ({program.parent.name})"
            for setting in settings:
                entries.append(Entry(f"{peer} {setting}", peer, bench(program, setting, options)))
    return entries


def bench(program: Path, setting: str, options: argparse.Namespace) -> Run:
    command = [program.resolve(), "-m", options.model, "-t", options.threads, "-ngl", 0]
    command += ["-o", "json", *setting.split()]
    environment = os.environ | {"LD_LIBRARY_PATH": str(program.resolve().parent)}

    def printed(lengths: str, n_decode: int, *more: object) -> str:
        words = map(str, [*command, "-p", lengths, "-n", n_decode, *more])
        done = subprocess.run([*words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stderr[-1000:]}")
        return done.stdout

    def run() -> Reads:
        done = printed(",".join(map(str, options.prompts)), options.decode, "-r", 1)
        # A build may print other lines first.
        tests = json.loads(done[done.index("[\n") :])
        return {test["n_prompt"]: Read(test["avg_ts"]) for test in tests}

    def cpu_s(n_prompt: int, n_decode: int, n_repetitions: int = 1) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        printed(str(n_prompt), n_decode, "-r", n_repetitions, "-w", 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def run_for_cpu_time() -> Reads:
        few_s = cpu_s(N_FEW, 0)  # loading the model and first accesses to its weights
        reads = {n: Read((n - N_FEW) / (cpu_s(n, 0) - few_s)) for n in options.prompts}
        if options.decode:
            taken_s = cpu_s(0, options.decode, 5) - cpu_s(0, options.decode)
            reads[DECODED] = Read(options.decode * 4 / taken_s)
        return reads

    return run_for_cpu_time if options.clock == "cpu" else run


@contextmanager
def engines(options: argparse.Namespace) -> Iterator[tuple[list[Entry], dict[str, str]]]:
    """Return the given Python engines after a first run, and a note about each of them."""
    opened: list[PeerProcess] = []
    entries: list[Entry] = []
    notes = {}
    for kind in ENGINES:
        if (python := getattr(options, kind)) is None:
            continue
        show(f"\ropening the model with {kind} ", end="")
        try:
            process = PeerProcess(python, kind, options)
            opened.append(process)
            run = engine_run(process, options)
            run()
        except PeerError as error:
            notes[kind] = f"failed: {error}"
        else:
            notes[kind] = ", ".join(f"{name}: {value}" for name, value in process.about.items())
            entries.append(Entry(kind, kind, run))
    try:
        yield entries, notes
    finally:
        for process in opened:
            process.close()


def engine_run(process: PeerProcess, options: argparse.Namespace) -> Run:
    def run() -> Reads:
        reads = {n: Read(n / process.seconds(n, 1)) for n in options.prompts}
        if options.decode:
            first_s = process.seconds(N_DECODE_PROMPT, 1)
            all_s = process.seconds(N_DECODE_PROMPT, 1 + options.decode)
            reads[DECODED] = Read(options.decode / (all_s - first_s))
        return reads

    return run


@contextmanager
def ours(options: argparse.Namespace) -> Iterator[list[Entry]]:
    """Return pop-local's entries, in full and pruned, in a child that has run each once."""
    shape = source_shape(read_source(Path(options.model)))
    pruned = [Variant("pruned", is_patched=True, mode=1)]
    variants = pruned if options.sidecar else skipping(shape, options.skips)
    process = Child(options, max(options.prompts) + 64, None)

    def entry(variant: Variant) -> Entry:
        def run() -> Reads:
            reads = {}
            for n_prompt in options.prompts:
                done = process.run(prompt(shape.n_vocab, n_prompt), 1, variant)
                reads[n_prompt] = Read(n_prompt / done["ttft_s"], int(done["n_pruned"]))
            if options.decode:
                few = prompt(shape.n_vocab, N_DECODE_PROMPT)
                reads[DECODED] = Read(process.run(few, options.decode, variant)["decode"])
            return reads

        run()
        return Entry(f"pop-local {variant.name}", "", run)

    try:
        yield [entry(variant) for variant in [Variant("full", is_patched=True), *variants]]
    finally:
        process.close()


def measure(entries: list[Entry], n_rounds: int) -> dict[str, list[Reads]]:
    """Return the reads of each entry, by round."""
    runs: dict[str, list[Reads]] = {entry.name: [] for entry in entries}
    for number in range(n_rounds):
        shift = number % len(entries)
        for entry in entries[shift:] + entries[:shift]:
            show(f"\rround {number + 1} of {n_rounds}: {entry.name:40}", end="")
            runs[entry.name].append(entry.run())
    show("\r" + " " * 70 + "\r", end="")
    return runs


def rows_of(n_prompt: int, entries: list[Entry], runs: dict[str, list[Reads]]) -> list[Row]:
    speeds = {name: [one[n_prompt].tokens_per_s for one in reads] for name, reads in runs.items()}
    spreads = {name: spread(values) for name, values in speeds.items()}
    # The last setting of a peer wins: its best.
    ascending = sorted(entries, key=lambda entry: spreads[entry.name].median)
    best = {entry.peer: speeds[entry.name] for entry in ascending if entry.peer}
    return [
        Row(
            n_prompt=n_prompt,
            name=entry.name,
            n_pruned=runs[entry.name][0][n_prompt].n_pruned,
            tokens_per_s=spreads[entry.name],
            to_peers={
                peer: spread([a / b for a, b in zip(speeds[entry.name], values, strict=True)])
                for peer, values in sorted(best.items())
            },
        )
        for entry in entries
    ]


def print_rows(rows: list[Row]) -> None:
    heads = ["prompt", "", "tokens/s", *(f"to {peer}" for peer in rows[0].to_peers), "pruned"]
    print(f"| {' | '.join(heads)} |\n|---:|---|{'---:|' * (len(heads) - 2)}")
    for row in rows:
        ratios = [shown(value, 2) for value in row.to_peers.values()]
        cells = [f"{row.n_prompt:,}", row.name, shown(row.tokens_per_s, 1), *ratios]
        print(f"| {' | '.join(cells)} | {row.n_pruned or ''} |")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a GGUF file that the peers can open")
    for kind in SETTINGS:
        parser.add_argument(f"--{kind}", type=Path, action="append", default=[], metavar="PATH")
    for kind in ENGINES:
        parser.add_argument(f"--{kind}", type=Path, metavar="PYTHON")
    parser.add_argument("--sidecar", help="says what is pruned; without it --skips does")
    parser.add_argument("--skips", default="1/3", help="shares of the layers")
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--no-flash-attention",
        action="store_false",
        dest="flash_attention",
        help="for a llama-bench that was built without it",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp prints")
    # The child of measure_speed asks for these.
    parser.set_defaults(other=None, cpu=None)
    options = parser.parse_args()
    options.prompts = [int(each) for each in options.prompts.split(",")]
    return options


def main() -> None:
    options = parsed()
    with engines(options) as (theirs, notes), ours(options) as mine:
        entries = [*peers(options), *theirs, *mine]
        runs = measure(entries, options.rounds)
    lengths = [*options.prompts, *([DECODED] if options.decode else [])]
    rows = [row for n_prompt in lengths for row in rows_of(n_prompt, entries, runs)]
    if options.json:
        about = {"model": options.model, "machine": machine(), "threads": options.threads}
        about |= {"clock": options.clock, "load": os.getloadavg(), "engines": notes}
        print(json.dumps(about | {"rounds": options.rounds, "rows": [asdict(row) for row in rows]}))
    else:
        print(
            f"{options.model}: {machine()}, threads: {options.threads}, rounds: {options.rounds},"
            f" {options.clock} time, load average: {os.getloadavg()[1]:.1f}\n"
        )
        print_rows(rows)
        for name, note in notes.items():
            print(f"\n{name}: {note}")


if __name__ == "__main__":
    main()
