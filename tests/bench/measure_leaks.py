"""Measure how well learned sums and sidecars separate rows that were read from others. Not a test.

    python tests/bench/measure_leaks.py [MODEL.gguf --text FILE ...] [--rows 16,64,400] [--seed 0]

The windows of the texts are shuffled. Some are read into the sums, as many belong to an attacker
with similar texts, and --compared windows are neither. For each number of rows per input, the
program prints the AUC of each attack (support/leak_attack.py): 0.5 for a guess, 1 if all read rows
come first. Without MODEL, a small random model reads random tokens. The sums are those of the first
boundary that learning uses, and rows have the same weights as in learning.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import shared  # noqa: F401
from pop_converter.gguf.source import read_source
from pop_converter.projection import Projection
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.engine.learning.online_calibrator import _SHARES
from pop_local.engine.learning.shipped_windows import read_shipped_windows
from pop_local.engine.learning.sums import Summing, Sums
from pop_local.engine.llama.context import Context
from support.calls import prompt
from support.leak_attack import Attacker, Rows, own_sums
from support.shapes import read_shape
from support.synthetic import make_gguf

N = 512


def text_windows(context: Context, texts: Sequence[Path], seed: int) -> Iterator[list[int]]:
    """Yield the texts' windows of N tokens in random order."""
    windows: list[list[int]] = []
    for text in texts:
        tokens = context.vocabulary.tokenize(text.read_text(errors="replace"))
        windows += [tokens[at : at + N] for at in range(0, len(tokens) - N, N)]
    random.Random(seed).shuffle(windows)
    yield from windows


def random_windows(seed: int) -> Iterator[list[int]]:
    number = seed * 1_000_000
    while True:
        yield prompt(N, number)
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--rows", default="16,64,200,400", help="rows per input, ascending")
    parser.add_argument("--compared", type=int, default=40, help="windows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_small(Path(folder))
        with loaded(model, n_threads=1) as context:
            windows = (
                text_windows(context, options.text, options.seed)
                if options.text
                else random_windows(options.seed)
            )
            marks = [int(each) for each in options.rows.split(",")]
            measure(context, model, windows, marks, options.compared)


def make_small(folder: Path) -> Path:
    return make_gguf(folder / "llama.gguf", "llama", n_embd=64, n_head=2, n_ff=96)


def measure(
    context: Context, model: Path, windows: Iterator[list[int]], marks: list[int], n_compared: int
) -> None:
    shape = read_shape(model)
    boundary = shape.n_layer - max(1, round(shape.n_layer * _SHARES[0]))
    kinds = dict.fromkeys([boundary], (Projection.FITTED, Projection.WIDE))
    summing = Summing(read_source(model), shape, kinds)
    wanted = summing.wanted((boundary,))
    shipped = list(read_shipped_windows(context, wanted, 2 * shape.n_embd // N + 1, N))
    wide = summing.choose_input(boundary, [summing.state(boundary, each)[1:] for each in shipped])
    reader = WindowReader(context, wanted)
    attacker = Attacker(summing, reader, boundary, wide)
    sums = Sums({boundary: wide}, {boundary: summing.empty(boundary, summing.layers(boundary))})
    gram = sums.grams[boundary]
    print(f"{len(gram.xx)} inputs, {sum(xy.shape[1] for xy in gram.xy.values())} outputs")
    unread = [attacker.rows(next(windows)) for _ in range(n_compared)]
    read: list[Rows] = []
    own = own_sums([attacker.rows(next(windows))])
    for mark in marks:
        while gram.n_rows < mark * len(gram.xx):
            tapped = reader.window(next(windows))
            summing.add(sums, tapped)
            if len(read) < n_compared:
                read.append(attacker.rows_of(tapped))
            rows = attacker.rows(next(windows))
            own.add(rows.x, {0: rows.y}, np.ones(len(rows.x), np.float32))
        found = attacker.separations(gram, read, unread, own)
        words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{mark:5} rows per input: {words}", flush=True)


if __name__ == "__main__":
    main()
