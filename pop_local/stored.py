"""What lies in a models folder: models, their parts, sidecars and unfinished downloads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pop_converter.errors import PopError
from pop_converter.format import pop_meta
from pop_converter.header import read_header
from pop_converter.source import read_source

from pop_local.nearest import nearest_hint

SUFFIX = ".gguf"
SIDECAR_SUFFIX = ".pop-sidecar.gguf"
PARTIAL_SUFFIX = ".gguf.partial"
# Beside an unfinished download: where it comes from.
ORIGIN_SUFFIX = ".origin"
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Stored:
    """One model; `problem` says why it cannot be used, or is empty.

    `size_bytes` is of all its files, sidecars included. `boundary` and `projection` are the
    file's own, or else its sidecar's.
    """

    name: str
    files: tuple[Path, ...]
    sidecars: tuple[Path, ...] = ()
    size_bytes: int = 0
    architecture: str | None = None
    boundary: int | None = None
    projection: str | None = None
    problem: str = ""


def models_by_name(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The GGUF files of each model in their order, by its file name without the ending.

    The parts of a split model are one; sidecars are none.
    """
    found: dict[str, tuple[Path, ...]] = {}
    parts: dict[tuple[str, str], list[Path]] = {}
    for path in _files(folder, SUFFIX):
        match = _PART.fullmatch(path.name)
        if match:
            parts.setdefault((match["stem"], match["count"]), []).append(path)
        elif not path.name.endswith(SIDECAR_SUFFIX):
            found[path.name.removesuffix(SUFFIX)] = (path,)
    for (stem, count), paths in parts.items():
        name = f"{stem}-00001-of-{count}" if stem in found else stem
        found[name] = tuple(paths)
    return found


def file_by_name(folder: Path, name: str) -> Path | None:
    """A model's file, or the first of its parts; the name in any case, with or without .gguf."""
    wanted = name.lower().removesuffix(SUFFIX)
    for known, files in models_by_name(folder).items():
        if known.lower() == wanted:
            return files[0]
    return None


def stock(folder: Path) -> tuple[Stored, ...]:
    """All that lies there, in the order of the names; damaged files, too."""
    models = models_by_name(folder)
    sidecars = _sidecars(folder)
    stored = [_examined(name, files, sidecars.get(name, ())) for name, files in models.items()]
    stored += [
        _unusable(path.name.removesuffix(SUFFIX), paths, "its model is not in this folder")
        for name, paths in sidecars.items()
        if name not in models
        for path in paths
    ]
    stored += [
        _unusable(path.name, _with_origin(path), "unfinished download: pull it again")
        for path in _files(folder, PARTIAL_SUFFIX)
    ]
    return tuple(sorted(stored, key=lambda model: model.name.lower()))


def removable(folder: Path, name: str) -> tuple[Path, ...]:
    """The files that go with a name: a model and its sidecars, a sidecar alone, a download.

    Raises PopError for a file elsewhere, and for an unknown name, naming the nearest.
    """
    path = Path(name)
    if path.name != name and path.parent.resolve() != folder.resolve():
        raise PopError(
            f"{name} is not in the models folder", f"only what lies in {folder} is removed"
        )
    groups = {model.name: (*model.files, *model.sidecars) for model in stock(folder)}
    for sidecars in _sidecars(folder).values():
        groups |= {sidecar.name.removesuffix(SUFFIX): (sidecar,) for sidecar in sidecars}
    wanted = path.name.lower()
    for known, files in groups.items():
        if known.lower() in (wanted, wanted.removesuffix(SUFFIX)):
            return files
    raise PopError(
        f"there is no model {name!r} in {folder}",
        nearest_hint(path.name, {known: known for known in groups}, "see `pop-local list`"),
    )


def total_bytes(files: Iterable[Path]) -> int:
    # A link counts as itself: removing it frees nothing else.
    return sum(path.lstat().st_size for path in files)


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(".") and not path.is_dir()
    )


def _sidecars(folder: Path) -> dict[str, tuple[Path, ...]]:
    return {
        path.name.removesuffix(SIDECAR_SUFFIX): (path,) for path in _files(folder, SIDECAR_SUFFIX)
    }


def _with_origin(partial: Path) -> tuple[Path, ...]:
    origin = partial.with_name(partial.name + ORIGIN_SUFFIX)
    return (partial, origin) if origin.exists() else (partial,)


def _unusable(name: str, files: tuple[Path, ...], problem: str) -> Stored:
    return Stored(name, files, size_bytes=total_bytes(files), problem=problem)


def _examined(name: str, files: tuple[Path, ...], sidecars: tuple[Path, ...]) -> Stored:
    size_bytes = total_bytes((*files, *sidecars))
    try:
        source = read_source(files[0])
        metas = [pop_meta(source.first), *(pop_meta(read_header(path)) for path in sidecars)]
    except PopError as error:
        return Stored(name, files, sidecars, size_bytes, problem=error.message)
    architecture = source.first.get("general.architecture")
    meta = next((meta for meta in metas if meta), None)
    return Stored(
        name,
        files,
        sidecars,
        size_bytes,
        architecture=architecture if isinstance(architecture, str) else None,
        boundary=meta.boundary if meta else None,
        projection=meta.projection if meta else None,
    )
