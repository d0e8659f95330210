"""Mmprojs, the files that let a model see pictures, beside their models."""

import re
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import part_of, read_source

ARCHITECTURE = "clip"
# Words of a file's name that are no model's.
_GENERIC = re.compile(r"((mmproj|model|b?f\d+|gguf|pop|sidecar)(_|$))*(i?q\d\w*)?", re.IGNORECASE)


def mmproj_name(model: str) -> str:
    """Return the name of the mmproj for a model's file, where several models share a folder."""
    return f"mmproj-{_stem(model)}.gguf"


def _stem(model: str) -> str:
    part = part_of(model)
    return part.stem if part else model.removesuffix(".gguf").removesuffix(".pop")


def n_shared(mmproj: str, model: str) -> int:
    """Count the words that both names begin with, generic ones left out."""
    pairs = zip(_words(mmproj), _words(model), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _words(name: str) -> list[str]:
    words = re.split(r"[-.]", _stem(name).lower())
    return [word for word in words if not _GENERIC.fullmatch(word)]


def is_mmproj(path: Path) -> bool:
    """Tell whether a file is an mmproj; False for one that cannot be read."""
    try:
        return read_source(path).first.get("general.architecture") == ARCHITECTURE
    except (PopError, OSError):
        return False


def find_mmproj(model: Path) -> Path | None:
    """Return the mmproj beside a model: the one with its name, else the only one.

    One with another model's name is left alone, even if that model is gone.
    """
    files = [path for path in sorted(model.parent.glob("*.gguf")) if path != model]
    found = [path for path in files if "mmproj" in path.name]
    named = model.with_name(mmproj_name(model.name))
    chosen = named if named in found else found[0] if len(found) == 1 else None
    if chosen is None or not is_mmproj(chosen):
        return None
    if chosen == named or not _words(chosen.name):
        return chosen
    rivals = [path.name for path in files if path not in found]
    rivals = [name for name in rivals if _words(name) != _words(model.name)]
    most = max((n_shared(chosen.name, name) for name in rivals), default=0)
    return chosen if 0 < n_shared(chosen.name, model.name) >= most else None


def orphans(folder: Path, gone: Collection[Path]) -> tuple[Path, ...]:
    """Return the mmprojs of models that are `gone` from a folder.

    One that another model still uses, such as a converted copy, is left out.
    """
    models = (path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    kept = {find_mmproj(path) for path in models if path not in gone}
    named = {folder / mmproj_name(path.name) for path in gone} - kept
    return tuple(path for path in sorted(named) if path not in gone and is_mmproj(path))
