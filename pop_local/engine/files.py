"""Models of several files: llama_cpp's `Llama` knows one path, a sidecar is one more."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from pop_converter.source import Source

from . import backend

# Of the model that this thread opens; none for llama.cpp's own way of finding parts.
_wanted: ContextVar[tuple[Path, ...]] = ContextVar("wanted", default=())


def model_files(base: Source, sidecar: Path | None) -> tuple[Path, ...]:
    """All files to open when there is a sidecar, which comes last; none without one."""
    return () if sidecar is None else (*(part.path for part in base.parts), sidecar)


def load(path: Path, files: tuple[Path, ...], params: Any) -> Any:
    """llama.cpp's model from `files`, or from `path` when there are none; None when refused."""
    with opening(files):
        return backend.bindings().llama_model_load_from_file(str(path).encode(), params)


@contextmanager
def opening(files: tuple[Path, ...]) -> Iterator[None]:
    """Meanwhile, what this thread loads by path comes from `files`, if there are any."""
    _install(backend.bindings())
    token = _wanted.set(files)
    try:
        yield
    finally:
        _wanted.reset(token)


def _install(api: ModuleType) -> None:
    """Let llama_cpp's function for one path look at `_wanted`, once."""
    from_one = api.llama_model_load_from_file
    if hasattr(from_one, "from_one"):
        return

    def load_wanted(path: bytes, params: Any) -> Any:
        files = _wanted.get()
        if not files:
            return from_one(path, params)
        paths = (ctypes.c_char_p * len(files))(*(str(file).encode() for file in files))
        return api.llama_model_load_from_splits(paths, len(files), params)

    load_wanted.from_one = from_one  # type: ignore[attr-defined]
    api.llama_model_load_from_file = load_wanted  # type: ignore[attr-defined]
