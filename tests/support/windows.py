"""Sliding windows of the architectures that the tests make models of."""

from pathlib import Path

from converter.shape import read_shape


def windows_of(path: Path) -> tuple[int, ...]:
    """Return the visible positions of each layer, 0 for all."""
    return read_shape(path).windows
