"""Dequantize a model's tensors and read its layers' own K/V projections."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pop_base.errors import FormatError
from pop_converter.gguf.source import Source

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KvProjection:
    """A layer's own or fitted K/V projections, with K's rows first.

    `weight` [n_k + n_v, n_embd] is multiplied by gain * x, where x is the normalized input and
    `gain` [n_embd] is the weight of attn_norm. `bias` is [n_k + n_v]. `wide` [n_k + n_v, n_wide] is
    multiplied by a wide fit's extra inputs (fit/wide.py). `wide` is None for other projections.
    """

    gain: Floats
    weight: Floats
    bias: Floats
    n_k: int
    wide: Floats | None = None


class Weights:
    """A model's tensors by name, dequantized to float32 on access.

    Accessing a tensor that is missing or cannot be dequantized raises FormatError.
    """

    def __init__(self, source: Source) -> None:
        self._places = {
            tensor.name: (part, tensor) for part in source.parts for tensor in part.tensors
        }

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Floats:
        return self.rows(name, slice(None))

    def names(self, prefix: str) -> tuple[str, ...]:
        """Return the names that start with `prefix`, with the prefix removed."""
        return tuple(name[len(prefix) :] for name in self._places if name.startswith(prefix))

    def rows(self, name: str, numbers: NDArray[np.integer[Any]] | slice) -> Floats:
        """Return the matrix rows at the given indices, as an array [len(numbers), n]."""
        if name not in self._places:
            raise FormatError(f"the model has no tensor {name}", "download the file again")
        part, tensor = self._places[name]
        start = part.data_start + tensor.offset
        raw = np.memmap(part.path, np.uint8, "r", start, (tensor.size_bytes,))
        by_row = raw.reshape(*tensor.dims[:0:-1], -1)
        try:
            values = dequantize(by_row[numbers], GGMLQuantizationType(tensor.type))
            # An NVFP4 matrix's scale is a separate tensor (llama.cpp's build_lora_mm).
            scale = name.removesuffix("weight") + "scale"
            if name.endswith(".weight") and scale in self:
                values = values * self[scale]
        except (ValueError, NotImplementedError) as error:
            raise FormatError(
                f"{part.path}: tensor {name} has a type that cannot be dequantized",
                "convert with the model's own projections, or use a different quantization",
                cause="unreadable-tensor",
            ) from error
        return np.asarray(values, np.float32)

    def require_readable(self, layer: int) -> None:
        """Raise FormatError if the layer's K or V weights cannot be dequantized."""
        for part in ("qkv", "k", "v"):
            if (name := f"blk.{layer}.attn_{part}.weight") in self:
                self.rows(name, slice(1))

    def own_projection(self, layer: int, n_k: int, n_v: int) -> KvProjection:
        """Return a layer's own K/V projections, which have `n_k` and `n_v` rows."""
        n_kv = n_k + n_v
        gain = self[f"blk.{layer}.attn_norm.weight"]
        if f"blk.{layer}.attn_qkv.weight" in self:
            weight = self[f"blk.{layer}.attn_qkv.weight"][-n_kv:]
            return KvProjection(gain, weight, self._bias(layer, "qkv", n_kv), n_k)
        k, v = (self[f"blk.{layer}.attn_{part}.weight"] for part in "kv")
        bias = np.concatenate([self._bias(layer, "k", len(k)), self._bias(layer, "v", len(v))])
        return KvProjection(gain, np.concatenate([k, v]), bias, len(k))

    def _bias(self, layer: int, part: str, n: int) -> Floats:
        name = f"blk.{layer}.attn_{part}.bias"
        return self[name][-n:] if name in self else np.zeros(n, np.float32)
