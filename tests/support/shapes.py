"""The shape of a model file, as the product has it of a source."""

from pathlib import Path

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.source import read_source


def read_shape(path: Path) -> ModelShape:
    """Read the shape of a model, split or not. Raises FormatError, UnsupportedArchitectureError."""
    return source_shape(read_source(path))
