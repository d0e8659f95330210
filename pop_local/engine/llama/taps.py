"""Taps: what rows compute on their way through all layers, for fits of K/V projections.

See llama_pop_add_tap in llama-pop.h. A batch shows those of its last ubatch, and so does a deep
pass.
"""

import ctypes
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.llama import backend

Rows = NDArray[np.float32]


class _Kind(IntEnum):
    STATE, K, V, MASS = 0, 1, 2, 3


class _CTapped(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("kind", "layer", "pos", "n_rows", "n_cols")
    )


@dataclass(frozen=True)
class Wanted:
    """A choice of what is handed out: states at `boundaries`, K and V of `layers`.

    `weighing`: the layers whose attention weights the rows.
    """

    boundaries: tuple[int, ...]
    layers: tuple[int, ...] = ()
    weighing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tapped:
    """The rows of one ubatch, at positions from `position` on: arrays by layer.

    `states` [n_rows, n_embd] are what the layer is given. `k` (before norm and RoPE) is
    [n_rows, n_k], `v` [n_rows, n_v]. `mass` [n_rows] is the
    attention that a row receives from later ones, all heads together, of each 16th of them. All
    are views of `block`.
    """

    position: int
    n_rows: int
    block: Rows
    states: dict[int, Rows] = field(default_factory=dict)
    k: dict[int, Rows] = field(default_factory=dict)
    v: dict[int, Rows] = field(default_factory=dict)
    mass: dict[int, Rows] = field(default_factory=dict)

    def has(self, wanted: Wanted) -> bool:
        """Whether all that was wanted is here, but for the mass, which some memories lack."""
        return self.states.keys() >= set(wanted.boundaries) and min(
            self.k.keys(), self.v.keys(), key=len
        ) >= set(wanted.layers)


def set_taps(ctx: Any, wanted: Wanted | None) -> None:
    """Say what is handed out from now on, None for nothing. Raises PopError."""
    backend.require_patched().llama_pop_remove_taps(ctx)
    if wanted is not None:
        kinds = {
            _Kind.STATE: wanted.boundaries,
            _Kind.K: wanted.layers,
            _Kind.V: wanted.layers,
            _Kind.MASS: wanted.weighing,
        }
        for kind, layers in kinds.items():
            for layer in layers:
                backend.add_tap(ctx, kind, layer)


def take(ctx: Any, used: Rows | None = None) -> Tapped | None:
    """Return what the last ubatch handed out, None where that was nothing.

    `used`: the block of an earlier one that is not needed any more. Where it is large enough it is
    filled again, since new memory costs more than the copy.
    """
    library = backend.require_patched()
    found = [_CTapped() for _ in range(library.llama_pop_n_tapped(ctx))]
    for number, each in enumerate(found):
        library.llama_pop_get_tapped(ctx, number, ctypes.byref(each))
    if not found:
        return None
    ends = np.cumsum([each.n_rows * each.n_cols for each in found])
    block = used if used is not None and used.size >= ends[-1] else np.empty(ends[-1], np.float32)
    tapped = Tapped(found[0].pos, found[0].n_rows, block)
    by_kind = {
        _Kind.STATE: tapped.states,
        _Kind.K: tapped.k,
        _Kind.V: tapped.v,
        _Kind.MASS: tapped.mass,
    }
    for number, (each, end) in enumerate(zip(found, ends, strict=True)):
        rows = block[end - each.n_rows * each.n_cols : end]
        library.llama_pop_read_tapped(ctx, number, rows.ctypes.data_as(ctypes.c_void_p))
        shape = (each.n_rows,) if each.kind == _Kind.MASS else (each.n_rows, each.n_cols)
        by_kind[each.kind][each.layer] = rows.reshape(shape)
    return tapped
