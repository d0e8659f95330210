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

    def has(self, request: TapRequest) -> bool:
        """Return whether all requested values are present. The `mass` values are optional."""
        return self.states.keys() >= set(request.boundaries) and min(
            self.k.keys(), self.v.keys(), key=len
        ) >= set(request.layers)


def set_taps(ctx: Any, request: TapRequest | None) -> None:
    """Request values from subsequent batches (no values if None). Raises PopError on failure."""
    backend.require_patched().llama_pop_remove_taps(ctx)
    if request is not None:
        # In the order of enum llama_pop_tap_kind.
        kinds = (request.boundaries, request.layers, request.layers, request.weighing)
        for kind, layers in enumerate(kinds):
            for layer in layers:
                backend.call("llama_pop_add_tap", ctx, kind, layer)


def take(ctx: Any, used: Rows | None = None) -> Tapped | None:
    """Return the last ubatch's values, or None if no values were recorded.

    `used`: a block from an earlier result, reused if it is large enough. Allocating a new block
    would take longer than copying the values.
    """
    library = backend.require_patched()
    records = [_CTapped() for _ in range(library.llama_pop_n_tapped(ctx))]
    for number, record in enumerate(records):
        library.llama_pop_get_tapped(ctx, number, ctypes.byref(record))
    if not records:
        return None
    ends = np.cumsum([record.n_rows * record.n_cols for record in records])
    block = used if used is not None and used.size >= ends[-1] else np.empty(ends[-1], np.float32)
    tapped = Tapped(records[0].pos, records[0].n_rows, block)
    by_kind = (tapped.states, tapped.k, tapped.v, tapped.mass)
    for number, (record, end) in enumerate(zip(records, ends, strict=True)):
        rows = block[end - record.n_rows * record.n_cols : end]
        library.llama_pop_read_tapped(ctx, number, rows.ctypes.data_as(ctypes.c_void_p))
        values = by_kind[record.kind]
        shape = (record.n_rows,) if values is tapped.mass else (record.n_rows, record.n_cols)
        values[record.layer] = rows.reshape(shape)
    return tapped
