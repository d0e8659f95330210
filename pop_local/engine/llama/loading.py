"""How a model is loaded: its files and sidecar, devices, the context that memory allows."""

import ctypes
from contextlib import suppress
from operator import mul
from pathlib import Path
from typing import Any

import psutil

from pop_converter.architecture.arch_keys import require_loadable, trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.base.errors import PopError
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.rpc import Servers

DEFAULT_CTX = 8192


def load_model(
    source: Source, sidecar: Path | None, meta: PopMeta | None, params: Any, servers: Servers | None
) -> Any:
    """Load a model by its llama_model_params; returns llama.cpp's pointer, to be freed.

    With a sidecar the tensors come from all files (llama_model_load_from_splits). Raises PopError
    with llama.cpp's reason, and where it does not prune as `meta` says.
    """
    backend.require_patched()
    require_loadable(source.first)
    api = backend.bindings()
    if servers is not None:
        params.devices = ctypes.cast(servers.handles, ctypes.c_void_p)
    logs.forget_errors()
    api.llama_backend_init()
    path = source.first.path
    if sidecar is None:
        model = api.llama_model_load_from_file(str(path).encode(), params)
    else:
        files = [str(file).encode() for file in (*source.paths, sidecar)]
        paths = (ctypes.c_char_p * len(files))(*files)
        model = api.llama_model_load_from_splits(paths, len(files), params)
    if not model:
        named = path if sidecar is None else f"{path} with {sidecar}"
        raise PopError(f"{named} cannot be opened: {logs.first_error() or 'llama.cpp refuses it'}")
    wanted = meta.boundary if meta else 0
    if (found := max(0, backend.model_boundary(model))) != wanted:
        api.llama_model_free(model)
        raise PopError(
            f"the backend prunes from layer {found}, the file says {wanted}", backend.INSTALL_HINT
        )
    return model


def default_ctx(header: Header) -> int:
    """Return the context that the model was trained with, in tokens, at most DEFAULT_CTX."""
    return min(trained_ctx(header) or DEFAULT_CTX, DEFAULT_CTX)


def n_positions(source: Source) -> int:
    """Return how many positions a model has learned, past which llama.cpp aborts; 0: any number."""
    dims = {tensor.name: tensor.dims for tensor in source.tensors}.get("position_embd.weight", ())
    return dims[-1] if dims else 0


def kv_bytes(shape: ModelShape, n_ctx: int, *, is_windowed: bool = False) -> int:
    """Return the bytes of K and V in F16 of a context."""
    windows = shape.windows if is_windowed else [0] * shape.n_layer
    cells = [min(n_ctx, window or n_ctx) for window in windows]
    return int(2 * sum(map(mul, cells, map(shape.n_kv, range(shape.n_layer)))))


def require_room(
    source: Source, n_ctx: int, *, is_windowed: bool, holds_kv: bool, holds_states: bool
) -> None:
    """Raise PopError for a context whose K/V in F16 are more than the memory that is free.

    llama.cpp fills them with zeros, and the system ends the process. Where it `is_windowed`, layers
    with a sliding window count as that, the least that they take. `holds_kv`: they are in main
    memory, and in F16. Rows that can be redone (`holds_states`) have their state in F32 there,
    whatever computes. Other parts of a state are not counted.
    """
    needed_bytes, free_bytes = 0, psutil.virtual_memory().available + psutil.swap_memory().free
    with suppress(PopError):
        shape = source_shape(source)
        if holds_kv:
            needed_bytes = kv_bytes(shape, n_ctx, is_windowed=is_windowed)
        if holds_states:
            needed_bytes += 4 * n_ctx * shape.n_embd
    if needed_bytes > free_bytes:
        raise PopError(
            f"a context of {n_ctx:,} tokens takes {needed_bytes / 1e9:,.1f} GB of memory,"
            f" {free_bytes / 1e9:.1f} GB are free",
            "take a smaller context",
        )
