"""The speed-up limit: the ratio of multiply-accumulates without and with pruning.

The caller counts them, on llama.cpp's graph, for a prompt that is read into an empty cache up to
the last token's logits. The limit ignores everything but matrix products (norms, RoPE, softmax,
masks, activations, copies), and the hardware's efficiency with few rows.

Fitted projections cost as much as the layers' own projections, and less if those are fused with Q.
A *wide* fit (pop_converter.fit.wide) computes its input once per row and multiplies it for each
layer after the boundary. This module adds that work for fits that are not in a file yet.
"""

from collections.abc import Callable
from itertools import compress

from pop_converter.architecture.shape import ModelShape
from pop_converter.base.errors import PopError
from pop_converter.projection import Projection

# Full rows hardly count at this length, and questions about a document often reach it.
LIMIT_PROMPT = 2048

# (n_prompt, boundary, n_full) to multiply-accumulates; `boundary` None is the full model, and
# `n_full` includes the last row. Raises PopError.
Macs = Callable[[int, int | None, int], int]


def uncounted(n_prompt: int, boundary: int | None, n_full: int) -> int:
    """Raise PopError: the default `macs` of a plan without a counter."""
    raise PopError("this plan has no counter of its work", "give make_plan the argument macs")


def speedup_limit(macs: Macs, n_prompt: int, boundary: int, n_full: int, more: int = 0) -> float:
    """Return the ratio of full to pruned prefill work; `more` is a fit's work (`fit_macs`)."""
    n_full = max(1, min(n_full, n_prompt))  # the last row is always full
    return macs(n_prompt, None, n_prompt) / (macs(n_prompt, boundary, n_full) + more)


def wide_weights(shape: ModelShape, boundary: int, projection: Projection) -> int:
    """Return the weights of a wide fit beyond a plain fit's, 0 for other kinds."""
    n_wide = shape.n_wide(boundary, projection)
    if not n_wide:
        return 0
    n_prev, n_neurons = shape.wide_inputs(boundary)
    n_kv = sum(map(shape.n_kv, range(boundary + 1, shape.n_layer)))
    return (n_prev + 2 * n_neurons) * shape.n_embd + n_wide * n_kv


def fit_macs(shape: ModelShape, boundary: int, projection: Projection, n_prompt: int) -> int:
    """Return the work that a fit adds to a prompt, negative if the model fuses K and V with Q."""
    n_unfused = sum(compress(shape.n_q[boundary + 1 :], shape.is_fused[boundary + 1 :]))
    saved = 0 if projection == Projection.OWN else n_unfused * shape.n_embd
    return n_prompt * (wide_weights(shape, boundary, projection) - saved)


def left_share(macs: Macs, boundary: int, n_prompt: int = LIMIT_PROMPT) -> float | None:
    """Return the share of the skipped layers' work that context rows still do.

    The count follows from the full rows, which do this work twice: their true K/V replace the
    projected ones. None if full rows are read separately, as with recurrent states.
    """
    full = macs(n_prompt, None, n_prompt)
    left = macs(n_prompt, boundary, n_prompt - 1) - full
    return left / (full + left - macs(n_prompt, boundary, 1)) if left > 0 else None
