"""Group a model's tensors by layer and derive each layer's sizes."""

import re

from pop_base.errors import FormatError
from pop_converter.gguf.header import TensorInfo
from pop_converter.gguf.source import Source
from pop_converter.projection import TENSOR_MARK

_NAME = re.compile(r"blk\.([0-9]{1,4})\.(.+)")
# Layers with these tensors keep a single state instead of K/V for each token, or merge tokens.
_RECURRENT = ("ssm_", "shortconv.", "time_mix_", "attn_compressor_")
# Layers with lightning attention (MiniMax) have both of these tensors.
_LIGHTNING = {"attn_norm_2", "attn_gate"}


class LayerTensors(dict[str, TensorInfo]):
    """A layer's tensors by name. The names omit the prefix `blk.N.` and the suffix `.weight`."""

    def rows(self, name: str) -> int:
        return self[name].dims[1] if name in self and len(self[name].dims) == 2 else 0

    def inputs(self, name: str) -> int:
        return self[name].dims[0] if self.rows(name) else 0

    def attention(self, dim_k: int, dim_v: int) -> tuple[int, int, int]:
        """Return the row counts of Q, K, and V (0 for a missing projection)."""
        # KDA convolves K inside its recurrence, so the cache has no K.
        if self.is_recurrent and ("attn_k" not in self or "ssm_conv1d_k" in self):
            return 0, 0, 0
        if fused := self.rows("attn_qkv"):
            n_q = self.inputs("attn_output") * dim_k // max(dim_v, 1)
            n_k = (fused - n_q) * dim_k // max(dim_k + dim_v, 1)
            return n_q, n_k, fused - n_q - n_k
        n_k = self.rows("attn_k")
        if not n_k:
            return self.rows("attn_q"), self.rows("attn_kv_a_mqa") or self.rows("attn_kv"), 0
        return self.rows("attn_q"), n_k, self.rows("attn_v") or n_k

    @property
    def is_recurrent(self) -> bool:
        return any(name.startswith(_RECURRENT) for name in self) or self.keys() >= _LIGHTNING

    @property
    def no_refill(self) -> str:
        """The reason why the layer cannot process skipped rows later, or "" if it can."""
        if self.is_recurrent:
            return "recurrent layers keep a single state for all tokens"
        if any(name.startswith("indexer") for name in self):
            return "the cache contains more than K and V"
        return "the hidden state has multiple streams" if "altup_router" in self else ""

    @property
    def is_fittable(self) -> bool:
        has_kv = "attn_qkv" in self or {"attn_k", "attn_v"} <= self.keys()
        has_norm = "attn_norm" in self and "attn_norm.bias" not in self
        return has_kv and has_norm and not self.is_recurrent

    @property
    def n_neurons(self) -> int:
        """The number of neurons in a dense gated FFN, or 0 for other FFNs."""
        n_up, n_down = self.rows("ffn_up"), self.inputs("ffn_down")
        is_gated = n_up == 2 * n_down if "ffn_gate" not in self else n_up == n_down
        return n_down if is_gated and "ffn_norm" in self else 0

    @property
    def n_weights(self) -> int:
        # Vectors (norm gains) need no matrix product.
        return sum(tensor.n_elements for tensor in self.values() if len(tensor.dims) > 1)


def read_layers(source: Source, n_layer: int, *, repeat: bool) -> list[LayerTensors]:
    """Return a model's layers without any tensors that a conversion added.

    If `repeat` is true, a layer without tensors reuses those of an earlier layer. Raises
    FormatError if a layer still has no tensors.
    """
    path, layers = source.first.path, [LayerTensors() for _ in range(n_layer)]
    if not source.tensors:
        raise FormatError(f"{path} has a vocabulary but no layers", "pass the model file")
    for tensor in source.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match and int(match[1]) < n_layer and TENSOR_MARK not in tensor.name:
            layers[int(match[1])][match[2].removesuffix(".weight")] = tensor
    if repeat:
        n_own = sum(map(bool, layers))
        layers = [layer or layers[i % max(n_own, 1)] for i, layer in enumerate(layers)]
    empty = [number for number, layer in enumerate(layers) if not layer]
    if empty:
        raise FormatError(f"{path} has no tensors for layer {empty[0]}", "download the file again")
    return layers
