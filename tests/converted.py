"""Converted models for the tests of the engine."""

from pathlib import Path
from typing import Any

from pop_converter.plan import make_plan
from pop_converter.rewrite import convert
from pop_converter.shape import read_shape
from synthetic import make_gguf


def converted(source: Path, folder: Path, **plan: Any) -> Path:
    """Convert a model into a folder; `plan` goes to make_plan."""
    target = folder / f"{source.stem}.pop.gguf"
    convert(make_plan(read_shape(source), **plan), source, target)
    return target


def tiny(folder: Path, arch: str = "llama", boundary: int = 4, **recipe: object) -> Path:
    """A random model of 8 layers that skips from `boundary` on, sink 1 and tail 16."""
    return converted(make_gguf(folder / f"{arch}.gguf", arch, **recipe), folder, boundary=boundary)
