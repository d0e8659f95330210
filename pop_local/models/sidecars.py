"""Find a model's sidecar next to the model or in this package."""

import importlib.resources
from contextlib import suppress
from functools import cache
from pathlib import Path

from pop_base.errors import FormatError
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Binding, pop_meta, read_binding
from pop_converter.popfile.sidecar import SUFFIX, bind, existing_sidecar, pop_of

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


def measures_worse(copy: Path, base: Path) -> bool:
    """Return True if a converted copy's measured loss exceeds the sidecar's.

    The copy's KL must exceed the sidecar's by more than the sum of their standard errors. An
    unmeasured copy counts as worse than a measured sidecar. Returns False if the sidecar has not
    been measured.
    """
    with suppress(FormatError):
        source = read_source(base)
        ours, theirs = pop_meta(read_source(copy).first), pop_of(source, sidecar_of(source))
        if ours is not None and theirs is not None and (best := theirs.measured) is not None:
            found = ours.measured
            return found is None or found.kl_mean - best.kl_mean > found.kl_se + best.kl_se
    return False


@cache
def _bindings(folder: Path) -> dict[Path, Binding]:
    return {path: read_binding(read_header(path)) for path in folder.glob(f"*{SUFFIX}")}
