"""Open models by name or path."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pop_base.errors import FormatError, PopError
from pop_base.progress import Watch
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.calibration.needs import free_bytes
from pop_local.models import model_names as names
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.model_files import ModelFiles
from pop_local.models.sidecars import is_shipped, sidecar_of
from pop_local.workflows.pull import fetch_named

if TYPE_CHECKING:
    from pop_local.engine.engine_options import EngineOptions
    from pop_local.engine.llama.context import Context
    from pop_local.engine.model import PopModel


# Minimum free memory in bytes for opening two slots.
_MEMORY_FOR_TWO = 8e9
# The catalog's best models, with the free memory in bytes that each model needs.
_BEST = (("qwen-1.5b", 4e9), ("qwen-0.5b", 2e9))


def best_model() -> names.CatalogModel:
    """Return the best catalog model that fits in free memory."""
    n_free = free_bytes()
    return names.find(next((name for name, least in _BEST if n_free >= least), names.DEFAULT_MODEL))


def open_model(options: "EngineOptions", watch: Watch) -> "PopModel":
    """Open a model by name or path (see `model_files`).

    If `options.full` is true, warns about a sidecar for a different model and ignores it.
    `options.context.n_parallel` defaults to 2 if memory and the model allow it, and to 1 otherwise.
    Raises PopError or StoppedError.
    """
    files = _fitting_files(options, watch)
    options = replace(
        options,
        model=str(files.path),
        sidecar=files.sidecar,
        mmproj=options.mmproj or find_mmproj(files.path),
    )
    from pop_local.engine.model import PopModel

    def opened_with(n: int) -> PopModel:
        context = replace(options.context, n_parallel=n)
        return PopModel(replace(options, context=context))

    n_parallel = options.context.n_parallel
    try:
        opened = opened_with(_n_at_once(options) if n_parallel is None else n_parallel)
    except PopError as error:
        if n_parallel is not None or error.cause != "one-sequence":
            raise
        watch.on_note(f"Using one slot: {error.message}.")
        opened = opened_with(1)
    _warn_of_context(opened.engine.context, watch)
    return opened


def _fitting_files(options: "EngineOptions", watch: Watch) -> ModelFiles:
    if not options.full:
        return model_files(options.model, options.sidecar, watch, names_shipped=False)
    files = _files(options.model, options.sidecar, watch)
    if options.sidecar is None and files.sidecar is not None:
        try:
            pop_of(read_source(files.path), files.sidecar)
        except FormatError as error:
            watch.on_warning(PopError(f"ignoring the sidecar: {error.message}"))
            return ModelFiles(files.path)
    return files


def _warn_of_context(context: "Context", watch: Watch) -> None:
    n_ctx = context.options.n_ctx
    if n_ctx and context.n_ctx > n_ctx:
        watch.on_note(f"llama.cpp rounds the context length up to {context.n_ctx:,} tokens.")
    n_trained = context.files.n_ctx_train
    if n_ctx and n_ctx > n_trained:
        watch.on_warning(
            PopError(
                f"the model was trained on contexts of {n_trained:,} tokens and is unreliable on"
                " longer prompts",
                f"use a context of up to {n_trained:,} tokens",
            )
        )
    if not n_ctx and context.n_ctx < n_trained:
        watch.on_note(
            f"The context is limited to {context.n_ctx:,} of {n_trained:,} tokens, because the KV"
            " cache can use at most a quarter of the free memory."
        )


def _n_at_once(options: "EngineOptions") -> int:
    """Return the default number of sequences (2 if memory and the model allow it, otherwise 1)."""
    source = read_source(options.path)
    if free_bytes() < _MEMORY_FOR_TWO:
        return 1
    with suppress(PopError):
        return 1 if any(source_shape(source).windows) else 2
    return 2


def model_files(
    model: str, sidecar: Path | None, watch: Watch, *, names_shipped: bool = True
) -> ModelFiles:
    """Return the model's files. A note reports which sidecar was found, if any. Raises PopError.

    If `names_shipped` is false, a sidecar that ships with pop-local is not mentioned.
    """
    files = _files(model, sidecar, watch)
    if files.sidecar is not None and sidecar is None:
        named = str(files.sidecar)
        if is_shipped(files.sidecar):
            if not names_shipped:
                return files
            named = f"{files.sidecar.name} (shipped with pop-local)"
        watch.on_note(f"Sidecar: {named}.")
    return files


def _files(model: str, sidecar: Path | None, watch: Watch) -> ModelFiles:
    if sidecar is not None:
        if not sidecar.is_file():
            raise PopError(
                f"the sidecar {sidecar} does not exist",
                "check the path, or create a sidecar for the model",
                cause="no-sidecar",
            )
        return ModelFiles(base_file(model, watch), sidecar)
    entry = names.lookup(model)
    copy = names.stored_file(entry.pop_file) if entry else None
    if copy is not None and not (Path(model).is_file() or names.stored_model(model)):
        return ModelFiles(copy)
    base = base_file(model, watch)
    return ModelFiles(base, sidecar_of(read_source(base)))


def base_file(model: str, watch: Watch) -> Path:
    """Return the unconverted model's path, fetching it if necessary. Raises PopError."""
    try:
        return names.resolve(model, base=True)
    except PopError as error:
        if error.cause != "not-fetched":
            raise
    return fetch_named(model, names.models_dir(), watch)
