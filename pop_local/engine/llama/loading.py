"""Load a model's files and check whether a context fits in memory."""

import ctypes
import os
import sys
from contextlib import suppress
from operator import mul
from pathlib import Path
from typing import Any

import psutil

from pop_base.errors import PopError
from pop_base.files import mapped
from pop_converter.architecture.arch_keys import require_loadable, trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.engine.llama import backend, logs

# Context length of models whose trained length or size per token is unknown.
_UNKNOWN_CTX = 8192
_LEAST_CTX = 2048
# llama.cpp rounds context lengths up to a multiple of this number.
_CTX_STEP = 256
_POPULATE_READ = 22  # MADV_POPULATE_READ (Linux 5.14 or later)
# `madvise` holds the GIL, so Ctrl-C and other threads wait until a piece has been read.
_PIECE_BYTES = 1 << 22


def read_ahead(source: Source) -> None:
    """Read a model into Linux's page cache, in pages of 2 MiB if possible.

    Decode is faster from such pages. Reads nothing on other systems, or if the model is larger
    than the available memory.
    """
    require_loadable(source.first)
    if sys.platform != "linux" or source.size_bytes > psutil.virtual_memory().available:
        return
    for path in source.paths:
        with suppress(OSError), mapped(path) as view:
            for start in range(0, len(view), _PIECE_BYTES):
                view.madvise(_POPULATE_READ, start, min(_PIECE_BYTES, len(view) - start))


def load_model(source: Source, sidecar: Path | None, meta: PopMeta | None, params: Any) -> Any:
    """Load a model with the given llama_model_params. Returns a pointer that the caller must free.

    Raises PopError with llama.cpp's reason if the files cannot be loaded. Raises PopError if the
    library's boundary differs from `meta.boundary`.
    """
    backend.require_patched()
    require_loadable(source.first)
    api = backend.bindings()
    logs.forget_errors()
    api.llama_backend_init()
    path = source.first.path
    if sidecar is None:
        model = api.llama_model_load_from_file(os.fsencode(path), params)
    else:
        files = [os.fsencode(file) for file in (*source.paths, sidecar)]
        paths = (ctypes.c_char_p * len(files))(*files)
        model = api.llama_model_load_from_splits(paths, len(files), params)
    if not model:
        named = path if sidecar is None else f"{path} with {sidecar}"
        reason = logs.first_error() or "llama.cpp refuses it"
        raise PopError(f"{named} cannot be opened: {reason}")
    boundary = meta.boundary if meta else 0
    # -1: the architecture cannot be pruned.
    layer = max(0, backend.require_patched().llama_pop_model_boundary(model))
    if layer != boundary:
        api.llama_model_free(model)
        raise PopError(
            f"the backend's boundary is layer {layer}, but the file's boundary is {boundary}",
            backend.INSTALL_HINT,
        )
    return model


def default_ctx(source: Source, n_sequences: int, free_bytes: int | None = None) -> int:
    """Return the training context length in tokens, or a shorter length if memory is limited.

    The K/V of all sequences together may use up to a quarter of `free_bytes` (default: the free
    main memory). The length is never reduced below _LEAST_CTX tokens. Raises FormatError.
    """
    if free_bytes is None:
        free_bytes = psutil.virtual_memory().available
    trained = trained_ctx(source.first)
    with suppress(PopError):
        row_bytes = kv_bytes(source_shape(source), n_sequences)
        if trained and row_bytes:
            affordable = free_bytes // 4 // row_bytes // _CTX_STEP * _CTX_STEP
            return min(trained, max(affordable, _LEAST_CTX))
    return min(trained or _UNKNOWN_CTX, _UNKNOWN_CTX)


def kv_bytes(shape: ModelShape, n_ctx: int, *, is_windowed: bool = False) -> int:
    """Return the size in bytes of a context's F16 K and V."""
    windows = shape.windows if is_windowed else [0] * shape.n_layer
    cells = [min(n_ctx, window or n_ctx) for window in windows]
    return int(2 * sum(map(mul, cells, map(shape.n_kv, range(shape.n_layer)))))


def require_room(
    source: Source, n_ctx: int, *, is_windowed: bool, holds_kv: bool, keeps_states: bool
) -> None:
    """Raise PopError if a context needs more memory than is free.

    Without this check, the system could kill the process when llama.cpp zeroes the cache.
    `is_windowed`: whether sliding-window layers keep only the rows in the window. `holds_kv`:
    whether K/V are stored as F16 in main memory. `keeps_states`: whether each row's boundary state
    is stored as F32 in main memory. The check ignores all other buffers.
    """
    needed_bytes, free_bytes = 0, psutil.virtual_memory().available + psutil.swap_memory().free
    with suppress(PopError):
        shape = source_shape(source)
        if holds_kv:
            needed_bytes = kv_bytes(shape, n_ctx, is_windowed=is_windowed)
        if keeps_states:
            needed_bytes += 4 * n_ctx * shape.n_embd
    if needed_bytes > free_bytes:
        n_fits = max(256, n_ctx * free_bytes // needed_bytes // 256 * 256)
        raise PopError(
            f"a context of {n_ctx:,} tokens needs {needed_bytes / 1e9:,.1f} GB of memory,"
            f" but only {free_bytes / 1e9:.1f} GB is free",
            f"open the model with a smaller context, such as n_ctx={n_fits}",
            cause="context-over-memory",
            n_fits=n_fits,
        )
