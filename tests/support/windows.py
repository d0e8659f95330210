"""Sliding windows of the architectures that the tests make models of."""

from pathlib import Path

from converter.hyper import windows
from converter.shape import source_shape
from converter.source import read_source


def windows_of(path: Path) -> tuple[int, ...]:
    """Return the visible positions of each layer, 0 for all."""
    source = read_source(path)
    return windows(source.first, source_shape(source))
