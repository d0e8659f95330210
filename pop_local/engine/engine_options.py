"""Options that the CLI, the server, and the Python API use to open a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pop_converter.popfile.format import DeepRows
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama.context import ContextOptions
from pop_local.engine.prefill.plan import Reuse


@dataclass(frozen=True)
class EngineOptions:
    """Options for Engine.open.

    `model`: the GGUF file, or a model name that the caller must resolve. `sidecar`: a file with
    the model's POP keys and tensors. `mmproj`: the vision encoder's file, loaded on first use.
    `image_tokens`: the maximum number of tokens per image. `sink_tokens`, `tail_tokens`: the
    number of full rows at a prompt's start and end (default: the file's values). `deep_rows`: the
    criterion for deep rows (default: the file's criterion). `reuse`: which cached rows a prompt
    may reuse. `keep_states`: whether to keep boundary states for refilling. `parse_special`:
    whether to parse special tokens in messages and documents (if True, documents can inject
    turns). `full`: whether to start with pruning off. `prompt_cache`:
    cached states of earlier prompts.
    """

    model: str
    sidecar: Path | None = None
    mmproj: Path | None = None
    image_tokens: int | None = None
    sink_tokens: int | None = None
    tail_tokens: int | None = None
    deep_rows: DeepRows | None = None
    reuse: Reuse = Reuse.EDITED
    keep_states: bool = False
    parse_special: bool = False
    full: bool = False
    prompt_cache: PromptCache | None = None
    context: ContextOptions = field(default_factory=ContextOptions)

    @property
    def path(self) -> Path:
        return Path(self.model)

    @classmethod
    def of(cls, model: str | os.PathLike[str], **options: Any) -> "EngineOptions":
        """Create the options from keyword arguments. Raises TypeError for unknown arguments.

        `options`: fields of this class, fields of ContextOptions, or llama.cpp parameters.
        """
        names = {option.name for option in fields(cls)}
        own = {name: value for name, value in options.items() if name in names}
        own |= {name: Path(own[name]) for name in ("sidecar", "mmproj") if own.get(name)}
        rest: Mapping[str, Any] = {name: options[name] for name in options.keys() - names}
        return cls(os.fspath(model), context=ContextOptions.of(rest), **own)
