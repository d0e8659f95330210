"""Read a file's shape and POP keys from its header."""

from pathlib import Path

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import PopMeta, pop_meta


def read_shape(path: Path) -> ModelShape:
    """Read the shape of a model, split or not. Raises FormatError, UnsupportedArchitectureError."""
    return source_shape(read_source(path))


def read_pop_meta(path: Path) -> PopMeta | None:
    """Read the POP keys of a file; None when it has none. Raises FormatError."""
    return pop_meta(read_header(path))
