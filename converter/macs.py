"""The speed-up that pruning can reach at most, from multiply-accumulates alone.

A prompt of n tokens costs the *full* model, in each layer, n times the attention projections
(Q, K, V and output), n times the FFN, and causal attention: the token at position p scores and sums
the p + 1 positions up to its own, or as many as a sliding window leaves, at
n_head * (head_dim_k + head_dim_v) multiply-accumulates each. Two savings belong to the full model
already: only the last token needs logits, so the LM head runs for one row, and llama.cpp drops the
other rows of the last layer before its FFN (`inp_out_ids` in src/models/*.cpp).

The *pruned* model does the same below the boundary. Each layer from the boundary on projects K and
V for all n tokens, and runs in full for the few full rows only (the prompt's first tokens and its
last ones). The true K and V of these rows replace the projected ones: they are computed twice.
They attend causally to the whole prompt, so they are counted as the last rows of it; that the first
token, the attention sink, sees fewer positions does not show in four digits.

A *wide* fit (converter.wide) makes its input once for each row, and multiplies it for each layer
behind the boundary. With the boundary layer's attention among it, all rows have that layer's Q,
scores and sums, too.

Where the last layers share the K/V of earlier ones (Gemma 3n and 4) rows leave *exactly*: the last
layer with K/V of its own projects K and V for all rows, and everything after that runs for the rows
whose logits are asked for. The full model drops no rows there, not even in its last layer.

The limit is the quotient. It leaves out what is not a matrix product (norms, RoPE, softmax, masks,
activations, copies) and how well the hardware does with few rows.
"""

from bisect import bisect_left

from converter.format import ATTENTION, OWN
from converter.shape import ModelShape

# Long enough that the full rows hardly count, short enough for a question about a document.
LIMIT_PROMPT = 2048


def prefill_macs(
    shape: ModelShape, n_prompt: int, boundary: int | None, n_full: int, projection: str = OWN
) -> int:
    """Count what a prefill takes, from an empty KV cache to the last token's logits.

    Returns multiply-accumulates. `boundary` is the first skipped layer, None for the full model;
    `n_full` rows, the last one among them, run all layers (it does not matter for the full model).
    `projection`: that of a file (converter.format); only wide ones cost more than the others.
    """
    n_kept = shape.n_layer if boundary is None else boundary
    n_full = min(n_full, n_prompt)
    total = shape.head_macs + n_prompt * (shape.input_macs + shape.output_macs)
    for layer in range(shape.n_layer):
        n_rows = n_prompt if layer < n_kept else n_full
        n_ffn_rows = n_rows if layer < shape.n_layer - 1 or shape.exact else 1
        total += n_rows * (shape.attn_proj_macs[layer] + shape.kv_macs[layer])
        total += n_ffn_rows * shape.ffn_macs[layer]
        total += shape.attn_dim[layer] * _visible(n_prompt, n_rows, shape.swa_window[layer])
        if layer >= n_kept:
            total += n_prompt * shape.kv_macs[layer]
    if boundary is not None:
        total += n_prompt * wide_weights(shape, boundary, projection)
        if projection == ATTENTION:
            total += _attention(shape, boundary, n_prompt)
    return total


def wide_weights(shape: ModelShape, boundary: int, projection: str) -> int:
    """Count what a wide fit stores, and multiplies for each row, beyond a plain one; 0 for that."""
    n_wide = shape.n_wide(boundary, projection)
    if not n_wide:
        return 0
    n_prev, n_neurons = shape.wide_inputs(boundary)
    n_kv = sum(shape.kv_macs[layer] // shape.n_embd for layer in range(boundary + 1, shape.n_layer))
    return (n_prev + 2 * n_neurons) * shape.n_embd + n_wide * n_kv


def _attention(shape: ModelShape, layer: int, n_prompt: int) -> int:
    """Count a layer's attention for all rows, without K and V and the output projection."""
    n_q = shape.attn_proj_macs[layer] - shape.n_heads_out[layer] * shape.n_embd
    visible = _visible(n_prompt, n_prompt, shape.swa_window[layer])
    return n_prompt * n_q + shape.attn_dim[layer] * visible


def speedup_limit(
    shape: ModelShape, n_prompt: int, boundary: int, n_full: int, projection: str = OWN
) -> float:
    """Return how many times fewer multiply-accumulates the pruned prefill takes."""
    full = prefill_macs(shape, n_prompt, None, n_full)
    return full / prefill_macs(shape, n_prompt, boundary, n_full, projection)


def exact_macs(shape: ModelShape, n_prompt: int) -> int:
    """As prefill_macs, where all rows but the last one leave exactly; `shape.exact` is not 0."""
    last = shape.exact - 1
    total = shape.head_macs + n_prompt * shape.input_macs + shape.output_macs
    for layer in range(shape.n_layer):
        n_rows = n_prompt if layer < last else 1
        total += n_rows * (shape.attn_proj_macs[layer] + shape.ffn_macs[layer])
        total += n_prompt * shape.kv_macs[layer]
        total += shape.attn_dim[layer] * _visible(n_prompt, n_rows, shape.swa_window[layer])
    return total


def exact_limit(shape: ModelShape, n_prompt: int) -> float:
    """How many times fewer multiply-accumulates an exact prefill needs than the full one."""
    return prefill_macs(shape, n_prompt, None, 1) / exact_macs(shape, n_prompt)


def shortest_saving(shape: ModelShape, boundary: int, n_full: int) -> int:
    """Return the length of the shortest prompt that saves half as much as a long one.

    What is compared is the saved share of the work. The prompt has about 40 tokens for 17 full rows
    at any depth that is of use; what a shorter one could gain is a few milliseconds, and at most a
    third of its rows would be context. How long a prompt must be to gain at all on given hardware,
    pop_local.measure.break_even measures.
    """
    wanted = _saving(shape, LIMIT_PROMPT, boundary, n_full) / 2
    lengths = range(1, LIMIT_PROMPT)
    return 1 + bisect_left(lengths, wanted, key=lambda n: _saving(shape, n, boundary, n_full))


def _saving(shape: ModelShape, n_prompt: int, boundary: int, n_full: int) -> float:
    return 1 - 1 / speedup_limit(shape, n_prompt, boundary, n_full)


def _visible(n_prompt: int, n_rows: int, window: int) -> int:
    """Sum the positions that the last `n_rows` of a prompt attend to; a window of 0 is none."""
    return _causal(n_prompt, window) - _causal(n_prompt - n_rows, window)


def _causal(n: int, window: int) -> int:
    inside = min(n, window) if window else n
    return inside * (inside + 1) // 2 + (n - inside) * window
