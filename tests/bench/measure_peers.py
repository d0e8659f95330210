"""Measure speed next to llama.cpp and ik_llama.cpp. Not a test.

    python tests/bench/measure_peers.py MODEL.gguf [--llama PATH] [--ik PATH] [--sidecar FILE]
        [--prompts 512,2048] [--decode 32] [--threads 1] [--rounds 3] [--json]

Each PATH is a built `llama-bench` with its libraries in the same folder; an option may come twice.
This program builds neither. In each round, every setting runs once, in a rotating order. A peer
runs in a new process for each of its SETTINGS, pop-local in one child process, in full and pruned.
Pruning uses the sidecar, else each of `--skips`, or exact skipping if the model allows it.

Speeds are prompt tokens per second. Ours include sampling the first token, and row counters prove
the number of pruned rows. A ratio is computed within a round, to the peer's setting with the best
median at that length. With --decode N, N tokens are decoded, too, listed as prompt 0: ours after a
prompt of 16 tokens, a peer's without a prompt. All warm up first. Pin with `taskset`. Prints a
table, or one JSON object.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from measure_speed import (
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
    """Return each given program in each of its settings."""
    entries = []
    for kind, settings in SETTINGS.items():
        programs: list[Path] = getattr(options, kind)
        for program in programs:
            peer = kind if len(programs) == 1 else f"{kind} ({program.parent.name})"
            for setting in settings:
                entries.append(Entry(f"{peer} {setting}", peer, bench(program, setting, options)))
    return entries


def bench(program: Path, setting: str, options: argparse.Namespace) -> Run:
    lengths = ",".join(map(str, options.prompts))
    asked = f"-p {lengths} -n {options.decode} -r 1 -t {options.threads} -ngl 0 -o json {setting}"
    command = [program.resolve(), "-m", options.model, *asked.split()]
    environment = os.environ | {"LD_LIBRARY_PATH": str(program.resolve().parent)}

    def run() -> Reads:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stderr[-1000:]}")
        # A build may print other lines first.
        tests = json.loads(done.stdout[done.stdout.index("[\n") :])
        return {test["n_prompt"]: Read(test["avg_ts"]) for test in tests}

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
    parser.add_argument("--sidecar", help="says what is pruned; without it --skips does")
    parser.add_argument("--skips", default="1/3", help="shares of the layers")
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp prints")
    # The child of measure_speed asks for these.
    parser.set_defaults(other=None, clock="wall", cpu=None)
    options = parser.parse_args()
    options.prompts = [int(each) for each in options.prompts.split(",")]
    return options


def main() -> None:
    options = parsed()
    with ours(options) as mine:
        entries = [*peers(options), *mine]
        runs = measure(entries, options.rounds)
    lengths = [*options.prompts, *([DECODED] if options.decode else [])]
    rows = [row for n_prompt in lengths for row in rows_of(n_prompt, entries, runs)]
    if options.json:
        about = {"model": options.model, "machine": machine(), "threads": options.threads}
        print(json.dumps(about | {"rounds": options.rounds, "rows": [asdict(row) for row in rows]}))
    else:
        print(
            f"{options.model}: {machine()}, threads: {options.threads}, rounds: {options.rounds}\n"
        )
        print_rows(rows)


if __name__ == "__main__":
    main()
