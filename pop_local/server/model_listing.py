"""Find a server's models by name, and read model properties from the file headers."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pop_base.errors import PopError
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.sidecar import SUFFIX as SIDECAR_SUFFIX
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.images.pictures import has_pillow
from pop_local.engine.llama.loading import default_ctx, kv_bytes
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.infill import can_infill
from pop_local.engine.prompt.templates import Template
from pop_local.models.mmproj_files import ARCHITECTURE, find_mmproj
from pop_local.models.model_files import known_name, models_by_name
from pop_local.models.model_names import lookup
from pop_local.models.sidecars import sidecar_of

_LATEST = ":latest"  # Ollama's default tag, which its clients append


class ModelFile(NamedTuple):
    """A model's file and API name."""

    name: str
    path: Path


@dataclass(frozen=True)
class ModelInfo:
    """A model's description in listings.

    `boundary` is 0 if prompts are not pruned. While a model is closed, `exact` and `open_template`
    are None and `can_infill` is False, because their values are unknown.
    """

    name: str
    source: Source
    n_ctx: int
    boundary: int
    can_see: bool
    n_parallel: int
    exact: int | None = None
    can_infill: bool = False
    open_template: Template | None = None

    @property
    def is_loaded(self) -> bool:
        return self.open_template is not None

    @classmethod
    def of_model(cls, name: str, model: PopModel) -> "ModelInfo":
        engine = model.engine
        return cls(
            name,
            engine.context.files.source,
            engine.context.n_ctx,
            engine.sequences[0].settings.boundary,
            engine.prompter.can_see,
            len(engine.sequences),
            engine.sequences[0].settings.exact,
            can_infill(engine.context),
            engine.prompter.template,
        )

    @classmethod
    def of_file(cls, file: ModelFile, n_ctx: int | None, n_parallel: int) -> "ModelInfo":
        """Describe a model file. Raises PopError for damaged files."""
        others = (file.path.parent, file.path.with_name(file.path.stem + SIDECAR_SUFFIX))
        states = (_state(path) for path in (file.path, *others))
        return _described(file, n_ctx, n_parallel, tuple(states))

    @property
    def template(self) -> str:
        """The model's chat template ("" for a base model)."""
        return str(self.source.first.get("tokenizer.chat_template") or "")

    @property
    def needed_bytes(self) -> int:
        """The open model's estimated memory in bytes: file, F16 K/V, and F32 boundary states."""
        n_bytes, n = self.source.size_bytes, self.n_ctx * self.n_parallel
        with suppress(PopError):
            shape = source_shape(self.source)
            n_bytes += kv_bytes(shape, n)
            n_bytes += 4 * n * shape.n_embd * bool(self.boundary)
        return n_bytes


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes whenever the file or folder changes (None if neither exists)."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


@lru_cache(maxsize=1024)
def _source(path: Path, _file_state: object) -> Source:
    return read_source(path)


@lru_cache(maxsize=1024)
def _described(
    file: ModelFile, n_ctx: int | None, n_parallel: int, states: tuple[object, ...]
) -> ModelInfo:
    """Describe a model's file. A change in `states` invalidates the cached description."""
    source = _source(file.path, states[0])
    if source.first.get("general.architecture") == ARCHITECTURE:
        raise PopError(f"{file.path} is an mmproj, not a language model")
    meta = pop_of(source, sidecar_of(source))
    return ModelInfo(
        file.name,
        source,
        n_ctx or default_ctx(source, n_parallel),
        meta.boundary if meta else 0,
        has_pillow() and find_mmproj(file.path) is not None,
        n_parallel,
    )


def models_in(folder: Path) -> dict[str, Path]:
    """Map the name of each model in a folder, as `pop-local list` shows it, to its first file."""
    models = sorted(models_by_name(folder).items(), key=lambda item: item[0].lower())
    return {printable(name): files[0] for name, files in models if "mmproj" not in name}


def printable(name: str) -> str:
    """Escape undecodable bytes in a file name so that the string is valid Unicode."""
    return os.fsencode(name).decode(errors="backslashreplace")


def find(name: str, files: Mapping[str, Path]) -> ModelFile | None:
    """Return the model with this file name or catalog name, or None."""
    untagged = name[: -len(_LATEST)] if name.lower().endswith(_LATEST) else name
    model = lookup(name)
    for candidate in (name, untagged, *((model.pop_file, model.file) if model else ())):
        if match := known_name(candidate, files):
            return ModelFile(match, files[match])
    return None
