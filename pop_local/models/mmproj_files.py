"""Find a model's mmproj (image encoder) in its folder."""

import re
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

from pop_base.errors import PopError
from pop_converter.gguf.source import part_of, read_source

ARCHITECTURE = "clip"
# Parts of a file name that do not identify a model.
_GENERIC = re.compile(r"((mmproj|model|b?f\d+|gguf|pop|sidecar)(_|$))*(i?q\d\w*)?", re.IGNORECASE)


def mmproj_name(model: str) -> str:
    """Return the file name to use for the model's mmproj."""
    return f"mmproj-{_stem(model)}.gguf"


def _stem(model: str) -> str:
    part = part_of(model)
    return part.stem if part else model.removesuffix(".gguf").removesuffix(".pop")


def n_shared(mmproj: str, model: str) -> int:
    """Count the leading words that the two names share, ignoring generic words."""
    pairs = zip(_words(mmproj), _words(model), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _words(name: str) -> list[str]:
    words = re.split(r"[-.]", _stem(name).lower())
    return [word for word in words if not _GENERIC.fullmatch(word)]


def is_mmproj(path: Path) -> bool:
    """Return True if a file is a readable mmproj."""
    try:
        return read_source(path).first.get("general.architecture") == ARCHITECTURE
    except (PopError, OSError):
        return False


def find_mmproj(model: Path) -> Path | None:
    """Return the mmproj named after the model or, if none exists, the folder's only mmproj.

    An mmproj named after a different model is ignored, even if that model is not in the folder.
    """
    mmprojs = [path for path in sorted(model.parent.glob("*mmproj*.gguf")) if path != model]
    named = model.with_name(mmproj_name(model.name))
    mmproj = named if named in mmprojs else mmprojs[0] if len(mmprojs) == 1 else None
    if mmproj is None or not is_mmproj(mmproj):
        return None
    if mmproj == named or not _words(mmproj.name):
        return mmproj
    others = {path.name for path in model.parent.glob("*.gguf") if path not in mmprojs}
    rivals = [name for name in others if _words(name) != _words(model.name)]
    most = max((n_shared(mmproj.name, name) for name in rivals), default=0)
    return mmproj if 0 < n_shared(mmproj.name, model.name) >= most else None


def orphans(folder: Path, gone: Collection[Path]) -> tuple[Path, ...]:
    """Return the mmproj files in `folder` that were used only by the removed models in `gone`."""
    models = (path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    kept = {find_mmproj(path) for path in models if path not in gone}
    named = {folder / mmproj_name(path.name) for path in gone} - kept
    return tuple(path for path in sorted(named) if path not in gone and is_mmproj(path))
