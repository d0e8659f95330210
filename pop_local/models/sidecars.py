"""Find a model's sidecar next to the model or in this package."""

import importlib.resources
from functools import cache
from pathlib import Path

from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Binding, pop_meta, read_binding
from pop_converter.popfile.sidecar import SUFFIX, bind, existing_sidecar

# The shipped sidecars are for the catalog's models (docs/quality.md).
SHIPPED = Path(str(importlib.resources.files("pop_local") / "data" / "sidecars"))


def sidecar_of(base: Source) -> Path | None:
    """Return a model's sidecar, or None for a converted or unpruned model. Raises FormatError."""
    if pop_meta(base.first) is not None:
        return None
    if (path := existing_sidecar(base)) is not None:
        return path
    for path, binding in _bindings(SHIPPED).items():
        # Sizes are compared first, since computing the hash reads the vocabulary.
        if binding.base_bytes == base.size_bytes and binding == bind(base):
            return path
    return None


def is_shipped(sidecar: Path) -> bool:
    """Return True if the sidecar ships with this package."""
    return sidecar.parent == SHIPPED


@cache
def _bindings(folder: Path) -> dict[Path, Binding]:
    return {path: read_binding(read_header(path)) for path in folder.glob(f"*{SUFFIX}")}
