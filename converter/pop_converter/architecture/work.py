"""Compute the speedup limit, which is the ratio of full to pruned multiply-accumulates.

The caller counts the multiply-accumulates that llama.cpp's graph needs to read a prompt into an
empty cache and to compute the last token's logits. The count covers only matrix products. The limit
assumes that products with few rows are as efficient as those with many rows.

A fitted projection costs as much as the layer's own K/V projection, or less if the layer's own
projection is fused with Q. A *wide* fit (fit/wide.py) also computes extra inputs once per row. Each
layer after the boundary multiplies the extra inputs by its weights.
"""

from collections.abc import Callable
from itertools import compress

from pop_base.errors import PopError
from pop_converter.architecture.shape import ModelShape
from pop_converter.projection import Projection

# The typical length of a document with a question. At this length, full rows hardly matter.
LIMIT_PROMPT = 2048

# Returns the multiply-accumulates for (n_prompt, boundary, n_full). `boundary` is None for the full
# model; `n_full` includes the last row. Raises PopError.
Macs = Callable[[int, int | None, int], int]


def uncounted(n_prompt: int, boundary: int | None, n_full: int) -> int:
    """Raise PopError. This is a plan's default `macs` function."""
    raise PopError(
        "the plan has no function that counts multiply-accumulates", "pass `macs` to make_plan"
    )


def speedup_limit(macs: Macs, n_prompt: int, boundary: int, n_full: int, more: int = 0) -> float:
    """Return the ratio of full to pruned prefill work. `more` is the result of `fit_macs`."""
    n_full = max(1, min(n_full, n_prompt))  # the last row is always full
    return macs(n_prompt, None, n_prompt) / (macs(n_prompt, boundary, n_full) + more)


def wide_weights(shape: ModelShape, boundary: int, projection: Projection) -> int:
    """Return the number of weights that a wide fit adds to a plain fit, or 0 for other fits."""
    n_wide = shape.n_wide(boundary, projection)
    if not n_wide:
        return 0
    n_prev, n_neurons = shape.wide_inputs(boundary)
    n_kv = sum(map(shape.n_kv, range(boundary + 1, shape.n_layer)))
    return (n_prev + 2 * n_neurons) * shape.n_embd + n_wide * n_kv


def fit_macs(shape: ModelShape, boundary: int, projection: Projection, n_prompt: int) -> int:
    """Return how many multiply-accumulates a fit adds (negative if it avoids fused products)."""
    n_unfused = sum(compress(shape.n_q[boundary + 1 :], shape.is_fused[boundary + 1 :]))
    saved = 0 if projection == Projection.OWN else n_unfused * shape.n_embd
    return n_prompt * (wide_weights(shape, boundary, projection) - saved)
