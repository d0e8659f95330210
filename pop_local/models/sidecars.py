"""The sidecar of a model: the one beside it, else one that was learned, or is shipped for it."""

import importlib.resources
from contextlib import suppress
from pathlib import Path

from pop_converter.base.errors import FormatError
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import pop_meta, read_binding
from pop_converter.popfile.sidecar import SUFFIX, bind, existing_sidecar, read_sidecar
from pop_local.config.settings import learned_dir
from pop_local.models.learned import LearnedFiles

# For the models of the catalog (docs/quality.md tells how each was made), which are known by their
# hashes.
SHIPPED = Path(str(importlib.resources.files("pop_local") / "data" / "sidecars"))


def sidecar_of(base: Source) -> Path | None:
    """Return the sidecar to open a model with, None for none and for a converted model.

    Raises FormatError.
    """
    if pop_meta(base.first) is not None:
        return None
    return existing_sidecar(base) or _learned(base) or _shipped(base)


def _learned(base: Source) -> Path | None:
    """Return the one that was learned, None where there is none, or a damaged one."""
    path = LearnedFiles.of(base).sidecar
    with suppress(FormatError):
        if path.is_file():
            read_sidecar(path, base)
            return path
    return None


def is_learned(sidecar: Path) -> bool:
    """Tell whether a sidecar was made of what was read here."""
    return sidecar.parent == learned_dir()


def is_shipped(sidecar: Path) -> bool:
    """Tell whether a sidecar is one of this package's."""
    return sidecar.parent == SHIPPED


def _shipped(base: Source) -> Path | None:
    for path in SHIPPED.glob(f"*{SUFFIX}"):
        binding = read_binding(read_header(path))
        # A hash reads the vocabulary, a size nothing.
        if binding.base_bytes == base.size_bytes and binding == bind(base):
            return path
    return None
