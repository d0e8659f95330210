"""Describe operations of ggml for tests.

Arrays have ggml's dimensions in reverse order: the last one is contiguous in memory.
"""

from dataclasses import dataclass
from enum import IntEnum

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


class Rows(IntEnum):
    """enum ggml_pop_rows: the fastest kernels, upstream's only, or our same kernel for all rows."""

    FAST = 0
    NONE = 1
    ALL = 2


@dataclass(frozen=True)
class Stored:
    """Values of a ggml type as stored in a file: uint8 [..., bytes of a row]."""

    type: Type
    data: np.ndarray

    @property
    def n_values(self) -> int:
        """Return the number of values in a row."""
        n_block, n_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.data.shape[-1] // n_bytes * n_block

    @property
    def values(self) -> np.ndarray:
        """Return the values as float64 [..., values of a row]."""
        if self.type == Type.F16:
            return self.data.view(np.float16).astype(np.float64)
        return gguf.dequantize(self.data, self.type).astype(np.float64)


@dataclass(frozen=True)
class MulMat:
    """MUL_MAT of `weights` [..., n_out, n_in] and `x`, float32 [..., n_rows, n_in].

    `stride`: floats between the starts of two rows of x (0: n_in). `permuted`: n_out and n_rows are
    the second-last dimension in memory instead of the third-last, as in a KV cache.
    """

    weights: Stored
    x: np.ndarray
    stride: int = 0
    permuted: bool = False


@dataclass(frozen=True)
class MulMatId:
    """MUL_MAT_ID of `weights` [n_experts, n_out, n_in] and `x` [n_tokens, n_used or 1, n_in].

    `x` is float32. `ids`: int32 [n_tokens, >= n_used], of which the first n_used are used.
    """

    weights: Stored
    x: np.ndarray
    ids: np.ndarray
    n_used: int


@dataclass(frozen=True)
class Attention:
    """FLASH_ATTN_EXT with the tensor layout of a KV cache.

    `q`: float32 [n_streams, n_rows, n_heads, n_dims]. `k`, `v`: [n_streams, n_cells, n_kv_heads,
    n_dims], of which the first `n_kv` cells are used. `mask`: float16 [n_streams or 1,
    n_heads or 1, n_rows, n_kv]. `sinks`: float32 [n_heads].
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
    """GLU of `x` and `y`, float32 [..., n_rows, n]: gelu(x) * y, or the variant of gpt-oss.

    If `y` is None, each row of x has 2 n values: n of x, then n of y (`swapped`: y first). If `y`
    and `x` are the same array, they share a tensor. `stride`: floats between the starts of two rows
    (0: the row length).
    """

    x: np.ndarray
    y: np.ndarray | None = None
    swapped: bool = False
    stride: int = 0
    is_oai: bool = False


@dataclass(frozen=True)
class MulRows:
    """MUL of the rows of x, float32 [..., n_rows, n], and `factors`, float32 [..., n_rows, 1].

    `stride`: see Glu.
    """

    x: np.ndarray
    factors: np.ndarray
    stride: int = 0


@dataclass(frozen=True)
class RmsNormMul:
    """RMS_NORM of x, float32 [..., n_rows, n], then MUL by `gain`, float32 [n].

    `stride`: see Glu.
    """

    x: np.ndarray
    gain: np.ndarray
    eps: float = 1e-6
    stride: int = 0


# alpha and limit of gpt-oss's GLU
OAI = (1.702, 7.0)

Op = MulMat | MulMatId | Attention | Glu | MulRows | RmsNormMul
