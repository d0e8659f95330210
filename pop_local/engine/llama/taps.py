"""Taps: what rows compute on their way through all layers, for fits of K/V projections.

See llama_pop_add_tap in llama-pop.h. A ubatch of a prompt hands it out, and so does a deep pass.
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
    STATE, K, V, HEADS, MASS = range(5)


class _CTapped(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "layer", "pos", "n_rows", "n_cols")),
        ("data", ctypes.POINTER(ctypes.c_float)),
    )


@dataclass(frozen=True)
class Wanted:
    """What is handed out: states at `boundaries`, K and V of `layers`, their attention `heads`.

    `weighing`: the layers whose attention tells how much a row counts.
    """

    boundaries: tuple[int, ...]
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    weighing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tapped:
    """What the rows of one ubatch computed, at positions from `position` on; by layer.

    `states` [n_rows, n_embd] are what the layer is given. `k` (before norm and RoPE) is
    [n_rows, n_k], `v` [n_rows, n_v], `heads` [n_rows, n_head * head_dim_v]. `mass` [n_rows] is the
    attention that a row receives from later ones, all heads together, of each 16th of them.
    """

    position: int
    n_rows: int
    states: dict[int, Rows] = field(default_factory=dict)
    k: dict[int, Rows] = field(default_factory=dict)
    v: dict[int, Rows] = field(default_factory=dict)
    heads: dict[int, Rows] = field(default_factory=dict)
    mass: dict[int, Rows] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """The memory of all arrays."""
        every = (self.states, self.k, self.v, self.heads, self.mass)
        return sum(rows.nbytes for each in every for rows in each.values())

    def has(self, wanted: Wanted) -> bool:
        """Whether all that was wanted is here, but for the mass, which some memories lack."""
        return (
            self.states.keys() >= set(wanted.boundaries)
            and min(self.k.keys(), self.v.keys(), key=len) >= set(wanted.layers)
            and self.heads.keys() >= set(wanted.heads)
        )


def set_taps(ctx: Any, wanted: Wanted | None) -> None:
    """Say what is handed out from now on, None for nothing. Raises PopError."""
    backend.require_patched().llama_pop_remove_taps(ctx)
    if wanted is not None:
        kinds = {
            _Kind.STATE: wanted.boundaries,
            _Kind.K: wanted.layers,
            _Kind.V: wanted.layers,
            _Kind.HEADS: wanted.heads,
            _Kind.MASS: wanted.weighing,
        }
        for kind, layers in kinds.items():
            for layer in layers:
                backend.add_tap(ctx, kind, layer)


def take(ctx: Any) -> list[Tapped]:
    """Return what the ubatches since the last call handed out, in their order."""
    library = backend.require_patched()
    taken: list[Tapped] = []
    seen: set[tuple[int, int]] = set()
    found = _CTapped()
    for number in range(library.llama_pop_n_tapped(ctx)):
        library.llama_pop_get_tapped(ctx, number, ctypes.byref(found))
        if not taken or (found.kind, found.layer) in seen:
            taken.append(Tapped(found.pos, found.n_rows))
            seen.clear()
        seen.add((found.kind, found.layer))
        rows = np.ctypeslib.as_array(found.data, (found.n_rows, found.n_cols)).copy()
        of = taken[-1]
        if found.kind == _Kind.MASS:
            of.mass[found.layer] = rows[:, 0]
        else:
            (of.states, of.k, of.v, of.heads)[found.kind][found.layer] = rows
    library.llama_pop_forget_tapped(ctx)
    return taken
