"""List the models, sidecars, and unfinished downloads in a models folder."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_converter.gguf.source import part_names, part_of, read_source
from pop_converter.popfile.sidecar import SUFFIX as SIDECAR_SUFFIX
from pop_converter.popfile.sidecar import pop_of
from pop_local.models.sidecars import sidecar_of

SUFFIX = ".gguf"
PARTIAL_SUFFIX = ".gguf.partial"
_PARTS_SUFFIX = ".gguf.parts"
_UNFINISHED = "the download is incomplete: pull the model again"


@dataclass(frozen=True)
class ModelFiles:
    """A model's file and its sidecar. An unpruned or converted model has no sidecar."""

    path: Path
    sidecar: Path | None = None


@dataclass(frozen=True)
class StoredModel:
    """A model, a sidecar, or an unfinished download in a models folder.

    `size_bytes` includes the sidecar. `boundary` and `projection` come from the model's file, its
    sidecar, or a shipped sidecar. `problem` explains why the model is unusable, or is "".
    """

    name: str
    files: tuple[Path, ...]
    sidecar: Path | None = None
    size_bytes: int = 0
    architecture: str | None = None
    boundary: int | None = None
    projection: str | None = None
    problem: str = ""

    @property
    def all_files(self) -> tuple[Path, ...]:
        return (*self.files, self.sidecar) if self.sidecar else self.files


def models_by_name(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Map each model's file name (without the suffix) to the model's GGUF files.

    A split model's parts count as one model and are sorted by name. Sidecars are excluded.
    """
    models: dict[str, tuple[Path, ...]] = {}
    parts: dict[tuple[str, int], list[Path]] = {}
    for path in _files(folder, SUFFIX):
        if part := part_of(path.name):
            parts.setdefault((part.stem, part.count), []).append(path)
        elif not path.name.endswith(SIDECAR_SUFFIX):
            models[path.name.removesuffix(SUFFIX)] = (path,)
    for (stem, count), paths in parts.items():
        name = part_names(stem, count)[0].removesuffix(SUFFIX) if stem in models else stem
        models[name] = tuple(paths)
    return models


def parts_folder(model: Path) -> Path:
    """Return the hidden folder for a catalog model's downloaded wheels."""
    return model.with_name(f".{model.name}.parts")


def stock(folder: Path) -> tuple[StoredModel, ...]:
    """Return a folder's models, orphaned sidecars, and unfinished downloads, sorted by name."""
    models = map(_examine, _unread(folder))
    return tuple(sorted(models, key=lambda model: model.name.lower()))


def removable(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files of the model, sidecar, or unfinished download that is named `name`.

    Raises PopError if the file is in a different folder or the name is unknown.
    """
    path = Path(name)
    if path.name != name and path.parent.resolve() != folder.resolve():
        raise PopError(f"{name} is not in the models folder", f"choose a file in {folder}")
    groups = {model.name: model.all_files for model in _unread(folder)}
    groups |= {path.name.removesuffix(SUFFIX): (path,) for path in _files(folder, SIDECAR_SUFFIX)}
    if match := known_name(path.name.removeprefix("."), groups):
        return groups[match]
    raise PopError(
        f"the folder {folder} contains no model named {name!r}",
        nearest_hint(path.name, {match: match for match in groups}, "check the name"),
        cause="unknown-model",
    )


def known_name(name: str, names: Collection[str]) -> str | None:
    """Return the name in `names` that matches `name`, or None. Ignores case and the suffix .gguf.

    A name with the same capitalization takes precedence.
    """
    for variant in (name, name.removesuffix(SUFFIX)):
        if variant in names:
            return variant
    lower = name.lower()
    wanted_lower = (lower, lower.removesuffix(SUFFIX))
    return next((candidate for candidate in names if candidate.lower() in wanted_lower), None)


def total_bytes(files: Iterable[Path]) -> int:
    """Return the total size of files and folders in bytes. Links are not followed."""
    return sum(_bytes_in(path) if path.is_dir() else path.lstat().st_size for path in files)


def _bytes_in(folder: Path) -> int:
    """Return the total size of a folder's files in bytes. pip may delete files during the call."""
    n_bytes = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                n_bytes += Path(at, name).lstat().st_size
    return n_bytes


def _files(folder: Path, suffix: str) -> list[Path]:
    paths = folder.glob(f"*{suffix}")
    return sorted(path for path in paths if not (path.name.startswith(".") or path.is_dir()))


def _unread(folder: Path) -> Iterator[StoredModel]:
    sidecars = {
        path.name.removesuffix(SIDECAR_SUFFIX): path for path in _files(folder, SIDECAR_SUFFIX)
    }
    for name, files in models_by_name(folder).items():
        yield StoredModel(name, files, sidecars.pop(name, None))
    for path in sidecars.values():
        name = path.name.removesuffix(SUFFIX)
        yield StoredModel(name, (path,), problem="the sidecar's model is missing")
    for path in _files(folder, PARTIAL_SUFFIX):
        yield StoredModel(path.name, (path,), problem=_UNFINISHED)
    for path in sorted(folder.glob(f".*{_PARTS_SUFFIX}")):
        if path.is_dir() and not path.is_symlink():
            yield StoredModel(path.name.removeprefix("."), (path,), problem=_UNFINISHED)


def _examine(model: StoredModel) -> StoredModel:
    # A link counts as its target's size.
    here = [path.resolve() for path in model.all_files if path.exists()]
    model = replace(model, size_bytes=total_bytes(here))
    if model.problem:
        return model
    try:
        source = read_source(model.files[0])
        architecture = source.first.get("general.architecture")
        model = replace(model, architecture=str(architecture) if architecture else None)
        meta = pop_of(source, model.sidecar or sidecar_of(source))
    except PopError as error:
        return replace(model, problem=error.message.removeprefix(f"{model.files[0]} "))
    return replace(model, boundary=meta.boundary, projection=meta.projection) if meta else model
