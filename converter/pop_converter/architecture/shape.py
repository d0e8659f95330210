"""Read a model's layer sizes from its keys and tensor table."""

from dataclasses import dataclass

from pop_base.errors import FormatError
from pop_converter.architecture.arch_keys import MAX_LAYERS, ArchKeys
from pop_converter.architecture.arch_names import GEMMA3N_KV_LAYERS, REPEATED, UNFITTED
from pop_converter.architecture.layers import read_layers
from pop_converter.gguf.source import Source
from pop_converter.projection import Projection

# Block size of ggml's quantized types. Each row of an added tensor must consist of whole blocks.
_BLOCK_SIZE = 32
_MROPE = "each token has multiple positions (M-RoPE)"
_RMS_KEY = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class ModelShape:
    """A model's layer sizes. Each tuple has one entry per layer.

    `n_q`, `n_k`, and `n_v` are the row counts of the attention projections. MLA layers have K rows
    but no V rows. Layers that do not compute K/V have no K or V rows. `n_heads_out` is the
    combined output width of the attention heads. `n_neurons` is the number of neurons in a dense
    gated FFN, or 0 for other FFNs. `n_weights` is the number of weights in the layer's matrices.
    `windows` contains attention windows in tokens (0: no window). `is_recurrent` marks layers with
    a recurrent state, which cannot be overwritten row by row. `is_fittable` marks layers for which
    K/V projections can be fitted. `is_fused` marks layers with a single tensor for Q, K, and V.

    `no_refill` is the reason why skipped layers cannot process context tokens later, or "" if they
    can. `exact` is the first layer that reuses an earlier layer's K/V, or 0 if no layer does.
    The first `n_deepstack` layers add image features to the hidden state.
    """

    arch: str
    n_layer: int
    n_vocab: int
    n_embd: int
    n_q: tuple[int, ...]
    n_k: tuple[int, ...]
    n_v: tuple[int, ...]
    n_heads_out: tuple[int, ...]
    n_neurons: tuple[int, ...]
    n_weights: tuple[int, ...]
    windows: tuple[int, ...]
    is_recurrent: tuple[bool, ...]
    is_fittable: tuple[bool, ...]
    is_fused: tuple[bool, ...]
    exact: int = 0
    n_deepstack: int = 0
    no_refill: str = ""

    def n_kv(self, layer: int) -> int:
        """Return the total number of K and V values per token in a layer."""
        return self.n_k[layer] + self.n_v[layer]

    def fits(self, boundary: int) -> bool:
        """Return True if at least two layers are skipped and all skipped layers can be fitted."""
        return boundary < self.n_layer - 1 and all(self.is_fittable[boundary:])

    def wide_inputs(self, boundary: int) -> tuple[int, int]:
        """Return how many previous-token values and neurons a wide fit (fit/wide.py) uses."""
        n_prev = max(self.n_embd // 4 // _BLOCK_SIZE, 1) * _BLOCK_SIZE
        n_most = min(self.n_embd // 2, self.n_neurons[boundary])
        return n_prev, n_most // _BLOCK_SIZE * _BLOCK_SIZE

    def n_wide(self, boundary: int, projection: Projection) -> int:
        """Return the number of extra inputs in a wide fit, or 0 for other projections."""
        return sum(self.wide_inputs(boundary)) if projection == Projection.WIDE else 0


def source_shape(source: Source) -> ModelShape:
    """Read a model's layer sizes. Raises FormatError, UnsupportedArchitectureError."""
    keys = ArchKeys(source.first)
    n_layer = keys.number("block_count") - keys.number("nextn_predict_layers", 0)
    if not 0 < n_layer <= MAX_LAYERS:
        raise keys.wrong(
            f"the model has {n_layer} layers, but llama.cpp supports 1 to {MAX_LAYERS}"
        )
    layers = read_layers(source, n_layer, repeat=keys.arch in REPEATED)
    embedding = {tensor.name: tensor.dims for tensor in source.tensors}.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise FormatError(f"{source.first.path} has no token embeddings", "pass a language model")
    if (n_embd := keys.number("embedding_length")) < 1:
        raise keys.wrong("the embedding length is 0")
    if (n_deepstack := keys.number("n_deepstack_layers", 0)) >= n_layer:
        raise keys.wrong(f"too many layers add image features: {n_deepstack} of {n_layer}")
    n_shared = n_layer - GEMMA3N_KV_LAYERS if keys.arch == "gemma3n" else 0
    exact = n_layer - keys.number("attention.shared_kv_layers", max(n_shared, 0))
    if exact < 1:
        raise keys.wrong("no layer computes K/V")
    dim = n_embd // max(keys.number("attention.head_count", 1), 1)
    dims = keys.number("attention.key_length", dim), keys.number("attention.value_length", dim)
    parts = [
        layer.attention(*dims) if i < exact else (layer.rows("attn_q"), 0, 0)
        for i, layer in enumerate(layers)
    ]
    if any(min(part) < 0 for part in parts):
        raise keys.wrong("a fused Q/K/V tensor has too few rows for the attention heads")
    n_q, n_k, n_v = zip(*parts, strict=True)
    reasons = [*(layer.no_refill for layer in layers), _MROPE if keys.is_mrope else ""]
    has_fits = keys.arch not in UNFITTED and keys.header.of_arch(_RMS_KEY) is not None
    return ModelShape(
        arch=keys.arch,
        n_layer=n_layer,
        n_vocab=embedding[1],
        n_embd=n_embd,
        n_q=n_q,
        n_k=n_k,
        n_v=n_v,
        n_heads_out=tuple(layer.inputs("attn_output") for layer in layers),
        n_neurons=tuple(layer.n_neurons for layer in layers),
        n_weights=tuple(layer.n_weights for layer in layers),
        windows=keys.windows(n_layer),
        is_recurrent=tuple(layer.is_recurrent for layer in layers),
        is_fittable=tuple(has_fits and layer.is_fittable for layer in layers),
        is_fused=tuple("attn_qkv" in layer for layer in layers),
        exact=exact if exact < n_layer else 0,
        n_deepstack=n_deepstack,
        no_refill=next(filter(None, reasons), ""),
    )
