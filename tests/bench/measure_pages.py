"""Measure how decode speed depends on the page size of Linux's page cache. Not a test.

    python tests/bench/measure_pages.py MODEL.gguf FOLDER [--rounds 5] [--decode 64] [--cpu N]

Makes four copies of the model in FOLDER, which must be on a disk. Before each run, the program
puts one copy into the page cache in one of four ways:

- small writes: writes the copy in pieces of 64 KiB, so that its pages are already cached
- large writes: does the same in pieces of 2 MiB
- read: drops the copy from the cache, then reads it without madvise(MADV_HUGEPAGE)
- read ahead: does the same with madvise(MADV_HUGEPAGE), as pop-local does when it opens a model

Each round runs every way once, in a new process. The order rotates, so that changes in the
machine's speed affect all ways equally. Prints how many MB of each copy Linux maps in pages of
2 MiB, and the decode speed after 16 tokens (with sampling).
"""

import argparse
import json
import mmap
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from measure_speed import (
    CLOCKS,
    N_DECODE_PROMPT,
    Child,
    Variant,
    machine,
    prompt,
    ratio,
    show,
    shown,
    spread,
)
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source

POPULATE_READ = 22
WAYS = {"small writes": 1 << 16, "large writes": 1 << 21, "read": 0, "read ahead": 0}


def prepare(way: str, model: Path, folder: Path) -> Path:
    """Cache a copy of the model in the given way, and return its path."""
    path = folder / f"{way.replace(' ', '-')}.gguf"
    n_piece = WAYS[way]
    if n_piece:
        path.unlink(missing_ok=True)
        with model.open("rb") as source, path.open("wb", buffering=n_piece) as target:
            shutil.copyfileobj(source, target, 1 << 16)
        return path
    if not path.exists():
        shutil.copyfile(model, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if way == "read ahead":
                view.madvise(mmap.MADV_HUGEPAGE)
            view.madvise(POPULATE_READ)
    return path


def n_large_mb(path: Path) -> float:
    """Return how many MB of a cached file Linux maps in pages of 2 MiB."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view.madvise(POPULATE_READ)
        maps = Path("/proc/self/smaps").read_text()
    found = re.search(r"FilePmdMapped: *(\d+) kB", maps[maps.index(str(path)) :])
    assert found is not None
    return int(found[1]) / 1e3


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--verbose", action="store_true")
    parser.set_defaults(other=None, sidecar=None)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    source = Path(options.model)
    tokens = prompt(source_shape(read_source(source)).n_vocab, N_DECODE_PROMPT)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        shift = number % len(WAYS)
        for way in [*WAYS][shift:] + [*WAYS][:shift]:
            show(f"\rround {number + 1} of {options.rounds}: {way:20}", end="")
            options.model = str(prepare(way, source, options.folder).resolve())
            large_mb = n_large_mb(Path(options.model))
            child = Child(options, 512, None)
            variant = Variant("full", is_patched=True)
            child.run(tokens, 8, variant)
            runs[way].append(child.run(tokens, options.decode, variant) | {"large_mb": large_mb})
            child.close()
    show("")
    for way in WAYS:
        with suppress(FileNotFoundError):
            (options.folder / f"{way.replace(' ', '-')}.gguf").unlink()
    print(f"{source.name}: {machine()}, {options.threads} threads, {options.rounds} rounds\n")
    print("| cached by | MB in pages of 2 MiB | tokens/s | ratio to small writes |")
    print("|---|---:|---:|---:|")
    for way, done in runs.items():
        speed = spread([one["decode"] for one in done])
        large = spread([one["large_mb"] for one in done])
        relative = shown(ratio(done, runs["small writes"], "decode"), 2)
        print(f"| {way} | {shown(large, 0)} | {shown(speed, 1)} | {relative} |")
    print(json.dumps({"model": source.name, "machine": machine(), "runs": runs}))


if __name__ == "__main__":
    main()
