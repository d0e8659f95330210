"""The speed-up that pruning can reach at most: the quotient of multiply-accumulates.

They are counted on llama.cpp's own graph (pop_local.engine.llama.graph_macs), for a prompt that is
read into an empty cache up to the last token's logits. Left out is what is not a matrix product
(norms, RoPE, softmax, masks, activations, copies), and how well the hardware does with few rows.

Fitted projections cost as much as own ones, and less than those fused with Q. A *wide* fit
(pop_converter.fit.wide) makes its input once for each row, and multiplies it for each layer behind
the boundary. That is added here, for fits that no file has yet.
"""

from collections.abc import Callable
from itertools import compress

from pop_converter.architecture.shape import ModelShape
from pop_converter.base.errors import PopError
from pop_converter.projection import Projection

# Long enough that the full rows hardly count, short enough for a question about a document.
LIMIT_PROMPT = 2048


# Counts the multiply-accumulates of `n_prompt` tokens by the first skipped layer, None for the full
# model, and by how many rows are full, the last one among them. Raises PopError.
Macs = Callable[[int, int | None, int], int]


def uncounted(n_prompt: int, boundary: int | None, n_full: int) -> int:
    """Macs of plans that nobody asks for their speed-up."""
    raise PopError("nothing counts the work of this plan")


def speedup_limit(macs: Macs, n_prompt: int, boundary: int, n_full: int, more: int = 0) -> float:
    """Return how many times fewer multiply-accumulates the pruned prefill takes.

    `more` of them are a fit's (`fit_macs`).
    """
    n_full = max(1, min(n_full, n_prompt))  # the last token's logits make it one
    return macs(n_prompt, None, n_prompt) / (macs(n_prompt, boundary, n_full) + more)


def wide_weights(shape: ModelShape, boundary: int, projection: Projection) -> int:
    """Count what a wide fit stores, and multiplies for each row, beyond a plain one; 0 for that."""
    n_wide = shape.n_wide(boundary, projection)
    if not n_wide:
        return 0
    n_prev, n_neurons = shape.wide_inputs(boundary)
    n_kv = sum(map(shape.n_kv, range(boundary + 1, shape.n_layer)))
    return (n_prev + 2 * n_neurons) * shape.n_embd + n_wide * n_kv


def fit_macs(shape: ModelShape, boundary: int, projection: Projection, n_prompt: int) -> int:
    """Count what a fit adds to a prompt: less than 0 where own projections are fused with Q."""
    n_unfused = sum(compress(shape.n_q[boundary + 1 :], shape.is_fused[boundary + 1 :]))
    saved = 0 if projection == Projection.OWN else n_unfused * shape.n_embd
    return n_prompt * (wide_weights(shape, boundary, projection) - saved)


def left_share(macs: Macs, boundary: int, n_prompt: int = LIMIT_PROMPT) -> float | None:
    """Return the share of the skipped layers' work that is left to context rows.

    Full rows do what is left twice, since their true K/V replace those, and so it can be told. None
    where they are read apart, as with recurrent states.
    """
    full = macs(n_prompt, None, n_prompt)
    left = macs(n_prompt, boundary, n_prompt - 1) - full
    return left / (full + left - macs(n_prompt, boundary, 1)) if left > 0 else None
