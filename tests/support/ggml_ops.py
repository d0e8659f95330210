"""Operations of ggml, as tests write them down.

Arrays have ggml's dimensions in the opposite order: the last one is contiguous in memory.
"""

from dataclasses import dataclass
from enum import IntEnum

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


class Rows(IntEnum):
    """enum ggml_pop_rows: the fastest kernels, never ours, or the same of ours for all rows."""

    FAST = 0
    NONE = 1
    ALL = 2


@dataclass(frozen=True)
class Stored:
    """Values of a type, as a file has them: uint8 [..., bytes of a row]."""

    type: Type
    data: np.ndarray

    @property
    def n_values(self) -> int:
        """Values of a row."""
        n_block, n_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.data.shape[-1] // n_bytes * n_block

    @property
    def values(self) -> np.ndarray:
        """The same as float64 [..., values of a row]."""
        if self.type == Type.F16:
            return self.data.view(np.float16).astype(np.float64)
        return gguf.dequantize(self.data, self.type).astype(np.float64)


@dataclass(frozen=True)
class MulMat:
    """`weights`: [..., n_out, n_in]; `x`: float32 [..., n_rows, n_in].

    `stride`: floats from a row of x to the next one; 0: n_in. `permuted`: n_out and n_rows are not
    the last dimension but one in memory, but that before it, as in a KV cache.
    """

    weights: Stored
    x: np.ndarray
    stride: int = 0
    permuted: bool = False


@dataclass(frozen=True)
class MulMatId:
    """`weights`: [n_experts, n_out, n_in]; `x`: float32 [n_tokens, n_used or 1, n_in].

    `ids`: int32 [n_tokens, at least n_used], of which the first n_used count.
    """

    weights: Stored
    x: np.ndarray
    ids: np.ndarray
    n_used: int


@dataclass(frozen=True)
class Attention:
    """FLASH_ATTN_EXT with its tensors as a KV cache has them.

    `q`: float32 [n_streams, n_rows, n_heads, n_dims]; `k`, `v`: [n_streams, n_cells, n_kv_heads,
    n_dims], of which the first `n_kv` cells count; `mask`: float16 [n_streams or 1, n_heads or 1,
    n_rows, n_kv]; `sinks`: float32 [n_heads].
    """

    q: np.ndarray
    k: Stored
    v: Stored
    n_kv: int
    scale: float
    mask: np.ndarray | None = None
    sinks: np.ndarray | None = None
    max_bias: float = 0.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Glu:
    """GLU: by gelu gelu(x) * y, both float32 [..., n_rows, n], or as gpt-oss has it.

    `y`: None, and x has 2 n values a row, of which the first n are x and the others y, or the other
    way round where it is `swapped`; the same array as x: one tensor is both. `stride`: floats from
    a row to the next one; 0: as many as it has.
    """

    x: np.ndarray
    y: np.ndarray | None = None
    swapped: bool = False
    stride: int = 0
    is_oai: bool = False


@dataclass(frozen=True)
class MulRows:
    """MUL of rows of x, float32 [..., n_rows, n], by `factors`, float32 [..., n_rows, 1].

    `stride`: as of Glu.
    """

    x: np.ndarray
    factors: np.ndarray
    stride: int = 0


@dataclass(frozen=True)
class RmsNormMul:
    """RMS_NORM of x, float32 [..., n_rows, n], and MUL by `gain`, float32 [n].

    `stride`: as of Glu.
    """

    x: np.ndarray
    gain: np.ndarray
    eps: float = 1e-6
    stride: int = 0


# alpha and limit of gpt-oss's GLU
OAI = (1.702, 7.0)

Op = MulMat | MulMatId | Attention | Glu | MulRows | RmsNormMul
