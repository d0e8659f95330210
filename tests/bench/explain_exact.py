"""Why exact skipping stays below its limit by multiply-accumulates. Not a test.

    pop-local bench MODEL.gguf --threads 1 --json > bench.json
    python tests/bench/explain_exact.py MODEL.gguf bench.json

Two things are not in that limit, both of llama.cpp's CPU backend. It computes scores for all cells
in use, rounded up to 256, whether the mask lets a row see them or not, and llama-cpp-python opens
the cache of layers with a sliding window in full size. And the row that goes on alone reads the
weights of the last layers for itself, as in decoding, whose measured time says what that takes.
Prints Markdown: the limit, that by cells, the speed-up expected with the row's time, what was
measured, and its share of the expected.
"""

import json
import sys
from pathlib import Path

from converter.macs import exact_macs, prefill_macs
from converter.shape import ModelShape, read_shape

N_UBATCH = 512
N_PAD = 256


def cells_macs(shape: ModelShape, n_prompt: int, *, exact: bool) -> int:
    """Multiply-accumulates of scores and sums over all cells in use, ubatch by ubatch."""
    total = 0
    for start in range(0, n_prompt, N_UBATCH):
        n_rows = min(N_UBATCH, n_prompt - start)
        n_kv = -(-(start + n_rows) // N_PAD) * N_PAD
        is_last = start + n_rows == n_prompt
        for layer in range(shape.n_layer):
            leaves = exact and layer >= shape.exact - 1
            total += shape.attn_dim[layer] * n_kv * (is_last if leaves else n_rows)
    return total


def visible_macs(shape: ModelShape, n_prompt: int, *, exact: bool) -> int:
    """What the limit counts of attention instead."""
    blind = ModelShape(**{**vars(shape), "attn_dim": (0,) * shape.n_layer})
    count = exact_macs if exact else lambda of, n: prefill_macs(of, n, None, 1)
    return count(shape, n_prompt) - count(blind, n_prompt)


def one_row(shape: ModelShape, first: int) -> int:
    """Multiply-accumulates of one row in the layers from `first` on, attention left out."""
    layers = range(first, shape.n_layer)
    return shape.head_macs + sum(
        shape.attn_proj_macs[layer] + shape.kv_macs[layer] + shape.ffn_macs[layer]
        for layer in layers
    )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    shape = read_shape(Path(sys.argv[1]))
    rows = json.loads(Path(sys.argv[2]).read_text())["rows"]
    print("| prompt | limit | by cells | with the row's time | measured | of it |")
    print("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        n = row["n_prompt"]
        full = prefill_macs(shape, n, None, 1)
        full_cells = full - visible_macs(shape, n, exact=False) + cells_macs(shape, n, exact=False)
        exact = exact_macs(shape, n)
        exact_cells = exact - visible_macs(shape, n, exact=True) + cells_macs(shape, n, exact=True)
        full_s = row["full_ttft_s"]["median"]
        row_s = one_row(shape, shape.exact) / one_row(shape, 0) / row["decode_tokens_per_s"]["full"]
        expected = full_s / (full_s * exact_cells / full_cells + row_s)
        measured = row["speedup"]["median"]
        print(
            f"| {n:,} | {full / exact:.3f} | {full_cells / exact_cells:.3f} | {expected:.3f}"
            f" | {measured:.3f} | {measured / expected:.1%} |"
        )


if __name__ == "__main__":
    main()
