"""Taps: intermediate values of full rows, used to fit K/V projections.

See llama_pop_add_tap in llama-pop.h. `take` reads only the last ubatch of a batch or a deep pass.
"""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.llama import backend

Rows = NDArray[np.float32]


class _CTapped(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("kind", "layer", "pos", "n_rows", "n_cols")
    )


@dataclass(frozen=True)
class TapRequest:
    """A request for the states at `boundaries` and for the K and V of `layers`.

    `weighing`: the layers for which to return `mass`, which contains the rows' weights for a fit.
    """

    boundaries: tuple[int, ...]
    layers: tuple[int, ...] = ()
    weighing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tapped:
    """Per-layer arrays for one ubatch's rows. The first row has position `position`.

    `states` [n_rows, n_embd]: the layer's input. `k` [n_rows, n_k]: K before norm and RoPE. `v`
    [n_rows, n_v]. `mass` [n_rows]: the attention that each row receives from every 16th row after
    it, summed over heads. All arrays are views into `block`.
    """

    position: int
    n_rows: int
    block: Rows
    states: dict[int, Rows] = field(default_factory=dict)
    k: dict[int, Rows] = field(default_factory=dict)
    v: dict[int, Rows] = field(default_factory=dict)
    mass: dict[int, Rows] = field(default_factory=dict)

    def has(self, wanted: TapRequest) -> bool:
        """Return whether all requested values are present. The `mass` values are optional."""
        return self.states.keys() >= set(wanted.boundaries) and min(
            self.k.keys(), self.v.keys(), key=len
        ) >= set(wanted.layers)


def set_taps(ctx: Any, wanted: TapRequest | None) -> None:
    """Request values from subsequent batches (no values if None). Raises PopError on failure."""
    backend.require_patched().llama_pop_remove_taps(ctx)
    if wanted is not None:
        # In the order of enum llama_pop_tap_kind.
        kinds = (wanted.boundaries, wanted.layers, wanted.layers, wanted.weighing)
        for kind, layers in enumerate(kinds):
            for layer in layers:
                backend.call("llama_pop_add_tap", ctx, kind, layer)


def take(ctx: Any, used: Rows | None = None) -> Tapped | None:
    """Return the last ubatch's values, or None if no values were recorded.

    `used`: a block from an earlier result, reused if it is large enough. Allocating a new block
    would take longer than copying the values.
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
    by_kind = (tapped.states, tapped.k, tapped.v, tapped.mass)
    for number, (each, end) in enumerate(zip(found, ends, strict=True)):
        rows = block[end - each.n_rows * each.n_cols : end]
        library.llama_pop_read_tapped(ctx, number, rows.ctypes.data_as(ctypes.c_void_p))
        values = by_kind[each.kind]
        shape = (each.n_rows,) if values is tapped.mass else (each.n_rows, each.n_cols)
        values[each.layer] = rows.reshape(shape)
    return tapped
