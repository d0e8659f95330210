"""Bindings for the C ABI in llama-pop.h, using the library that llama_cpp loaded.

Setters raise PopError if the library rejects a value. `ctx` is a pointer to a llama_context.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from enum import IntEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.llama import logs

ABI = 13
OURS, OTHER = "pop-local-llama-cpp", "llama-cpp-python"
INSTALL_HINT = f"run pip install ./patches/llama-cpp-python, or reinstall the {OURS} wheel"
# Number of times that a libgomp thread spins at a barrier. The default of 300,000 spins takes
# milliseconds, so threads on a busy machine would spend their time slices waiting for each other.
SPINS = "1000"


class Reading(IntEnum):
    """Kinds of prompt rows that a batch can contain.

    NONE: the batch has no prompt rows. SOME: the prompt rows may include full rows. CONTEXT: all
    prompt rows are context rows, so only answers have full rows.
    """

    NONE = 0
    SOME = 1
    CONTEXT = 2


class Mode(IntEnum):
    """A context's pruning mode.

    OFF: every row runs through all layers. CONTEXT: context rows are pruned, or skip layers without
    loss if layers share K/V. ALWAYS: every row is pruned.
    """

    OFF = 0
    CONTEXT = 1
    ALWAYS = 2


@dataclass(frozen=True)
class Counters:
    """Counts of rows computed since the last reset.

    `n_context` rows stopped at the boundary, and `n_full` rows ran through all layers. `n_exact`
    rows skipped only layers that reuse earlier layers' K/V, so nothing was lost. `n_deep`: number
    of full rows selected by `set_deep_rows` (`n_marked` in llama_pop_counters).
    """

    n_context: int
    n_full: int
    n_exact: int = 0
    n_deep: int = 0

    @property
    def n_rows(self) -> int:
        return self.n_context + self.n_full + self.n_exact


_CCounters = ctypes.c_int64 * 5  # llama_pop_counters
_ABORTED = 2  # LLAMA_POP_DEEP_ABORTED
INVALID_ROWS = -2  # see `move_rows`
_INT32 = ctypes.c_int32
_POINTER = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "llama_pop_model_boundary": ([_POINTER], _INT32),
    "llama_pop_model_exact": ([_POINTER], _INT32),
    "llama_pop_set_mode": ([_POINTER, _INT32], _INT32),
    "llama_pop_get_mode": ([_POINTER], _INT32),
    "llama_pop_set_boundary": ([_POINTER, _INT32], _INT32),
    "llama_pop_get_boundary": ([_POINTER], _INT32),
    "llama_pop_set_full_from": ([_POINTER, _INT32, _INT32], _INT32),
    "llama_pop_set_sink": ([_POINTER, _INT32], _INT32),
    "llama_pop_set_deep_rows": ([_POINTER, _INT32, _POINTER, _INT32], _INT32),
    "llama_pop_move_rows": ([_POINTER, _INT32, _INT32, _POINTER, _POINTER, _INT32], _INT32),
    "llama_pop_set_overwrite": ([_POINTER, ctypes.c_bool], _INT32),
    "llama_pop_set_snapshots": ([_POINTER, ctypes.c_bool], _INT32),
    "llama_pop_snapshots_size": ([_POINTER], ctypes.c_size_t),
    "llama_pop_run_deep": ([_POINTER, _INT32, _POINTER, _INT32, ctypes.c_bool], _INT32),
    "llama_pop_set_kernels": ([_POINTER, ctypes.c_bool], _INT32),
    "llama_pop_set_reading": ([_POINTER, _INT32], _INT32),
    "llama_pop_add_tap": ([_POINTER, _INT32, _INT32], _INT32),
    "llama_pop_remove_taps": ([_POINTER], None),
    "llama_pop_n_tapped": ([_POINTER], _INT32),
    "llama_pop_get_tapped": ([_POINTER, _INT32, _POINTER], _INT32),
    "llama_pop_read_tapped": ([_POINTER, _INT32, _POINTER], _INT32),
    "llama_pop_count_macs": ([_POINTER, _INT32, _INT32], ctypes.c_int64),
    "llama_pop_tokenize": (
        [
            *(_POINTER, ctypes.c_char_p, _INT32, _POINTER, _INT32),
            *(ctypes.c_bool, ctypes.c_bool, _POINTER, _POINTER),
        ],
        _INT32,
    ),
    "llama_pop_get_counters": ([_POINTER, ctypes.POINTER(_CCounters)], None),
    "llama_pop_reset_counters": ([_POINTER], None),
}


@functools.cache
def bindings() -> ModuleType:
    """Redirect llama.cpp's log, then import and return llama_cpp's low-level module.

    Raises PopError if the module is missing or has been overwritten by another distribution.
    """
    ours = find_spec("llama_cpp")
    used = ours and ours.origin and Path(ours.origin).resolve()
    for other in metadata.distributions(name=OTHER):
        # A backend in a virtual environment shadows the system's distribution.
        if used and Path(str(other.locate_file("llama_cpp/__init__.py"))).resolve() != used:
            continue
        raise PopError(
            f"{OTHER} {other.version} has overwritten {OURS}'s files",
            f"run pip uninstall {OTHER} (which removes both packages' files), then {INSTALL_HINT}",
        )
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        import llama_cpp.llama_cpp as llama_cpp
    except ImportError as error:
        raise PopError(
            f"{OURS} cannot be imported: {error}",
            f"{INSTALL_HINT} (uninstalling {OTHER} also removes {OURS}'s files)",
        ) from error
    except (AttributeError, OSError, RuntimeError) as error:
        raise PopError(f"the llama.cpp library cannot be loaded: {error}", INSTALL_HINT) from error
    from llama_cpp._ctypes_extensions import load_shared_library

    logs.take_over(llama_cpp, load_shared_library("ggml-base", llama_cpp._base_path))
    if report_exceptions := getattr(llama_cpp._lib, "llama_pop_report_exceptions", None):
        report_exceptions.restype = None
        report_exceptions()
    return llama_cpp


def version() -> str:
    bindings()
    import llama_cpp

    return str(llama_cpp.__version__)


def library_abi() -> int | None:
    """Return the loaded library's C ABI version, or None if the library is unpatched."""
    function = getattr(bindings()._lib, "llama_pop_abi", None)
    return None if function is None else int(function())


@functools.cache
def require_patched() -> ctypes.CDLL:
    """Return the library after setting the ABI functions' argument types.

    Raises PopError if the library is unpatched or does not have the required ABI version.
    """
    abi = library_abi()
    if abi is None:
        raise PopError("the installed llama.cpp cannot prune because it is unpatched", INSTALL_HINT)
    if abi != ABI:
        raise PopError(f"the backend uses ABI {abi}, but pop-local needs ABI {ABI}", INSTALL_HINT)
    library: ctypes.CDLL = bindings()._lib
    for name, (argument_types, result_type) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = result_type
    return library


def model_exact(model: Any) -> int:
    """Return the first layer that rows without logits can skip losslessly, or 0 if none exists."""
    return int(require_patched().llama_pop_model_exact(model))


def get_mode(ctx: Any) -> Mode:
    return Mode(require_patched().llama_pop_get_mode(ctx))


def set_mode(ctx: Any, mode: Mode) -> None:
    call("llama_pop_set_mode", ctx, mode)


def get_boundary(ctx: Any) -> int:
    return int(require_patched().llama_pop_get_boundary(ctx))


def set_boundary(ctx: Any, layer: int) -> None:
    """Set the boundary and use own projections. If `layer` is 0, use the file's boundary."""
    call("llama_pop_set_boundary", ctx, layer)


def set_full_from(ctx: Any, sequence: int, position: int) -> None:
    """Run a sequence's rows from `position` onward through all layers (-1 selects no rows)."""
    call("llama_pop_set_full_from", ctx, sequence, position)


def set_deep_rows(ctx: Any, sequence: int, positions: np.ndarray) -> None:
    """Set the positions of a sequence's deep rows, in ascending order."""
    array = np.ascontiguousarray(positions, np.int32)
    call("llama_pop_set_deep_rows", ctx, sequence, array.ctypes.data_as(_POINTER), len(array))


def set_sink(ctx: Any, n_tokens: int) -> None:
    """Run each sequence's first `n_tokens` rows (the file's number if -1) through all layers."""
    call("llama_pop_set_sink", ctx, n_tokens)


def run_deep(ctx: Any, sequence: int, positions: np.ndarray) -> bool:
    """Run the boundary layer and all later layers for up to one ubatch of a sequence's rows.

    `positions`: int32, ascending. Computes no logits. Returns False if the abort callback stopped
    the pass. The caller must then repeat the pass. Raises PopError on failure.
    """
    logs.forget_errors()
    pointer = positions.ctypes.data_as(_POINTER)
    status = require_patched().llama_pop_run_deep(ctx, sequence, pointer, len(positions), False)
    if status not in (0, _ABORTED):
        raise PopError(logs.first_error() or f"could not run the remaining layers (code {status})")
    return bool(status == 0)


def move_rows(ctx: Any, sequence: int, start: int, sources: np.ndarray, tokens: np.ndarray) -> None:
    """Replace a sequence's rows from position `start` onward with an edited prompt's rows.

    `tokens`, `sources`: int32 [n]. A source is the position to copy K/V from, or -1. Rows with
    source -1 must be decoded in place (see `set_overwrite`) before later rows attend to them.
    Raises PopError on failure. If the error's `status` is INVALID_ROWS, the caller must drop the
    rows from `start` onward.
    """
    arrays = [np.ascontiguousarray(array, np.int32) for array in (sources, tokens)]
    pointers = [array.ctypes.data_as(_POINTER) for array in arrays]
    call("llama_pop_move_rows", ctx, sequence, start, *pointers, len(sources))


def set_overwrite(ctx: Any, is_on: bool) -> None:
    """Allow single-sequence batches to overwrite rows that already have cells.

    Each row attends to rows up to its own position. A failed batch may leave some rows overwritten.
    """
    call("llama_pop_set_overwrite", ctx, is_on)


def count_macs(ctx: Any, n_tokens: int, n_full: int) -> int:
    """Count the multiply-accumulates for a prompt with `n_full` full rows in the current mode.

    The count assumes an empty cache and includes the last row's logits. Raises PopError.
    """
    logs.forget_errors()
    n_macs = int(require_patched().llama_pop_count_macs(ctx, n_tokens, n_full))
    if n_macs < 0:
        raise PopError(logs.first_error() or f"cannot count the operations for {n_tokens} tokens")
    return n_macs


def set_reading(ctx: Any, reading: Reading) -> None:
    """Specify the kind of prompt rows in all subsequent batches.

    pop-local's kernels process prompt batches of any size. Therefore, the batch size does not
    affect the results if flash attention is on. During decoding, llama.cpp uses pop-local's
    kernels only for operations that run faster with them.
    """
    call("llama_pop_set_reading", ctx, reading)


def get_counters(ctx: Any) -> Counters:
    counters = _CCounters()
    require_patched().llama_pop_get_counters(ctx, ctypes.byref(counters))
    n_context, n_full, n_exact, _, n_marked = counters
    return Counters(n_context, n_full, n_exact, n_deep=n_marked)


def reset_counters(ctx: Any) -> None:
    require_patched().llama_pop_reset_counters(ctx)


def call(name: str, ctx: Any, *values: Any) -> None:
    """Call an ABI function that returns 0 on success. Raises PopError if the function fails."""
    logs.forget_errors()
    if status := getattr(require_patched(), name)(ctx, *values):
        raise PopError(logs.first_error() or f"{name}{values} failed", status=status)
