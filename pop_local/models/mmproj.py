"""Mmprojs, the files that let a model see pictures, beside their models."""

from pathlib import Path

from converter.errors import PopError
from converter.source import part_of, read_source

ARCHITECTURE = "clip"
_NAMES = "*mmproj*.gguf"


def mmproj_name(model: str) -> str:
    """Return what the mmproj of a model's file is called, where several models lie in a folder."""
    part = part_of(model)
    stem = part.stem if part else model.removesuffix(".gguf").removesuffix(".pop")
    return f"mmproj-{stem}.gguf"


def is_mmproj(path: Path) -> bool:
    """Tell whether a file is one; False as well for what cannot be read."""
    try:
        return read_source(path).first.get("general.architecture") == ARCHITECTURE
    except (PopError, OSError):
        return False


def mmproj_beside(model: Path) -> Path | None:
    """Return the one that lies beside a model: the one with its name, or else the only one."""
    named = model.with_name(mmproj_name(model.name))
    found = [path for path in sorted(model.parent.glob(_NAMES)) if path != model]
    chosen = named if named in found else found[0] if len(found) == 1 else None
    return chosen if chosen is not None and is_mmproj(chosen) else None
