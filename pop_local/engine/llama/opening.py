"""What opening a model takes: its files, one more than llama_cpp knows of, devices, defaults."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, NoReturn

import psutil

from pop_converter.architecture.keys import trained_ctx
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.rpc import Servers
from pop_local.engine.prefill.plan import RowRule

DEFAULT_CTX = 8192
# llama_cpp sends stdout and stderr nowhere meanwhile (suppress_stdout_stderr): of two at once, the
# last would bring back what the first has left.
_LOADING = RLock()


@dataclass(frozen=True)
class _Wanted:
    """For the model that this thread opens; no files for llama.cpp's own way of finding parts."""

    files: tuple[Path, ...] = ()
    servers: Servers | None = None
    auto_attention: bool = False
    repack: bool = True


_wanted: ContextVar[_Wanted] = ContextVar("wanted", default=_Wanted())  # noqa: B039 (frozen)


class Closed:
    """What llama.cpp's objects become once they are freed: any use is a PopError, not a crash."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise PopError(f"the model {self._path} is closed", "open it again")


@contextmanager
def loading(
    base: Source,
    sidecar: Path | None,
    servers: Servers | None,
    *,
    auto_attention: bool = False,
    repack: bool = True,
) -> Iterator[None]:
    """Meanwhile, what this thread loads by path comes from all files of `base` and the sidecar.

    It computes on the servers, where there are any. `auto_attention`: with flash attention where
    the devices have it. `repack`: as of KvLlama. llama_cpp's `Llama` takes one path and none of the
    others, and offers no other way in.
    """
    _install(backend.bindings())
    files = () if sidecar is None else (*base.paths, sidecar)
    with _LOADING:
        before = _wanted.set(_Wanted(files, servers, auto_attention, repack))
        try:
            yield
        finally:
            _wanted.reset(before)


def _install(api: ModuleType) -> None:
    """Let llama_cpp's functions for a model and its context look at `_wanted`, once."""
    from_one, context_of = api.llama_model_load_from_file, api.llama_init_from_model
    if hasattr(from_one, "from_one"):
        return

    def load_wanted(path: bytes, params: Any) -> Any:
        wanted = _wanted.get()
        if wanted.servers:
            params.devices = ctypes.cast(wanted.servers.handles, ctypes.c_void_p)
        params.use_extra_bufts &= wanted.repack
        if not wanted.files:
            return from_one(path, params)
        names = [str(file).encode() for file in wanted.files]
        paths = (ctypes.c_char_p * len(names))(*names)
        return api.llama_model_load_from_splits(paths, len(names), params)

    def init_wanted(model: Any, params: Any) -> Any:
        if _wanted.get().auto_attention:
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        return context_of(model, params)

    load_wanted.from_one = from_one  # type: ignore[attr-defined]
    api.llama_model_load_from_file = load_wanted  # type: ignore[attr-defined]
    api.llama_init_from_model = init_wanted  # type: ignore[attr-defined]


def rule_of(meta: PopMeta | None) -> RowRule:
    if meta is None:
        return RowRule()
    return RowRule(meta.sink_tokens, meta.tail_tokens, meta.min_prompt)


def default_ctx(header: Header) -> int:
    """The context that the model was trained with, in tokens, at most DEFAULT_CTX."""
    return min(trained_ctx(header) or DEFAULT_CTX, DEFAULT_CTX)


def n_positions(source: Source) -> int:
    """Return how many positions a model has learned, past which llama.cpp aborts; 0: any number."""
    dims = {tensor.name: tensor.dims for tensor in source.tensors}.get("position_embd.weight", ())
    return dims[-1] if dims else 0


def require_room(
    source: Source, n_ctx: int, *, is_windowed: bool, holds_kv: bool, holds_states: bool
) -> None:
    """Raises PopError for a context whose K/V in F16 are more than the memory that is free.

    llama.cpp fills them with zeros, and the system ends the process. Where it `is_windowed`, layers
    with a sliding window count as that, the least that they take. `holds_kv`: they are in main
    memory, and in F16; rows that can be redone (`holds_states`) have their state in F32 there,
    whatever computes. Other parts of a state are not counted.
    """
    needed_bytes, free_bytes = 0, psutil.virtual_memory().available + psutil.swap_memory().free
    with suppress(PopError):
        shape = source_shape(source)
        windows = shape.windows if is_windowed else [0] * shape.n_layer
        cells = [min(n_ctx, window or n_ctx) for window in windows]
        if holds_kv:
            needed_bytes = 2 * sum(map(mul, cells, map(shape.n_kv, range(shape.n_layer))))
        if holds_states:
            needed_bytes += 4 * n_ctx * shape.n_embd
    if needed_bytes > free_bytes:
        raise PopError(
            f"a context of {n_ctx:,} tokens takes {needed_bytes / 1e9:,.1f} GB of memory,"
            f" {free_bytes / 1e9:.1f} GB are free",
            "take a smaller context",
        )
