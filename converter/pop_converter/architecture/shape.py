"""The layers of a model, from the keys and tensors that all GGUF files share."""

from dataclasses import dataclass

from pop_converter.architecture.arch_keys import ArchKeys
from pop_converter.architecture.arch_names import GEMMA3N_KV_LAYERS, REPEATED, UNFITTED
from pop_converter.architecture.layers import read_layers
from pop_converter.base.errors import FormatError
from pop_converter.gguf.source import Source
from pop_converter.projection import Projection

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
# Rows of added tensors come in blocks of ggml's quantised types.
_BLOCK_SIZE = 32
# Why rows of a model can be neither selected nor refilled, see Layer.no_refill for others.
_MROPE = "its rows have several positions each (M-RoPE)"
_RMS_KEY = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; tuples have one entry for each layer.

    `n_q`, `n_k`, `n_v`: rows of attention's projections. K without V is a compressed one (MLA), and
    a layer without K has no attention of its own. `n_heads_out`: what its heads give.
    `n_neurons`: those of a dense, gated FFN, 0 of any other. `n_weights`: elements of all matrices.
    `windows`: visible positions, 0 for all; a file that does not tell the layers with a window
    apart means all of them here. `is_recurrent`: whether a layer keeps a state that no row can
    overwrite. `is_fittable`: whether its K and V can be fitted; `is_fused`: its Q is in one tensor
    with them.

    `no_refill`: why rows can be neither selected nor refilled, "" where they can.
    `exact`: the first of the layers that read the K/V of an earlier one, 0 where each has its own.
    `n_deepstack`: the first layers, which add features of images to the state.
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
        """Return how many numbers K and V of a layer are, for one token."""
        return self.n_k[layer] + self.n_v[layer]

    def fits(self, boundary: int) -> bool:
        """Whether projections can be fitted at a boundary: for all layers, two at least."""
        return boundary < self.n_layer - 1 and all(self.is_fittable[boundary:])

    def wide_inputs(self, boundary: int) -> tuple[int, int]:
        """Return the sizes of the wider input (pop_converter.fit.wide): previous state, neurons.

        A quarter and a half of the state, in blocks of quantised rows.
        """
        n_prev = max(self.n_embd // 4 // _BLOCK_SIZE, 1) * _BLOCK_SIZE
        n_most = min(self.n_embd // 2, self.n_neurons[boundary])
        return n_prev, n_most // _BLOCK_SIZE * _BLOCK_SIZE

    def n_wide(self, boundary: int, projection: Projection) -> int:
        """Return how many inputs a fit has beside the state, 0 if it is not wide."""
        return sum(self.wide_inputs(boundary)) if projection == Projection.WIDE else 0


def source_shape(source: Source) -> ModelShape:
    """Return the shape of a model. Raises FormatError, UnsupportedArchitectureError."""
    keys = ArchKeys(source.first)
    n_layer = keys.number("block_count") - keys.number("nextn_predict_layers", 0)
    if not 0 < n_layer <= MAX_LAYERS:
        raise keys.wrong(f"says it has {n_layer} layers")
    layers = read_layers(source, n_layer, repeat=keys.arch in REPEATED)
    if (n_embd := keys.number("embedding_length")) < 1:
        raise keys.wrong("has states of 0 values")
    if (n_deepstack := keys.number("n_deepstack_layers", 0)) >= n_layer:
        raise keys.wrong(f"adds features of images to {n_deepstack} of {n_layer} layers")
    n_shared = n_layer - GEMMA3N_KV_LAYERS if keys.arch == "gemma3n" else 0
    exact = n_layer - keys.number("attention.shared_kv_layers", max(n_shared, 0))
    if exact < 1:
        raise keys.wrong("has no layer with K/V of its own")
    dim = n_embd // max(keys.number("attention.head_count", 1), 1)
    dims = keys.number("attention.key_length", dim), keys.number("attention.value_length", dim)
    parts = [
        layer.attention(*dims) if i < exact else (layer.rows("attn_q"), 0, 0)
        for i, layer in enumerate(layers)
    ]
    if any(min(part) < 0 for part in parts):
        raise keys.wrong("has fused projections that are too small for its heads")
    n_q, n_k, n_v = zip(*parts, strict=True)
    reasons = [*(layer.no_refill for layer in layers), _MROPE if keys.is_mrope else ""]
    has_fits = keys.arch not in UNFITTED and keys.header.of_arch(_RMS_KEY) is not None
    return ModelShape(
        arch=keys.arch,
        n_layer=n_layer,
        n_vocab=_n_vocab(source),
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


def _n_vocab(source: Source) -> int:
    dims = {tensor.name: tensor.dims for tensor in source.tensors}.get("token_embd.weight", ())
    if len(dims) != 2:
        raise FormatError(f"{source.first.path} has no token embeddings", "give a language model")
    return dims[1]
