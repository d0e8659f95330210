"""Open models for commands and chats."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pop_base.errors import PopError
from pop_base.numbers import duration
from pop_converter.gguf.source import read_source
from pop_local.commands.shared_options import ModelOptions
from pop_local.config import settings
from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.context import ContextOptions
from pop_local.engine.llama.devices import busy_cpus, default_threads
from pop_local.engine.model import PopModel
from pop_local.ui.console import note, warn
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.conversion.duration import sidecar_seconds
from pop_local.workflows.open import best_model, open_model


def default_model() -> str:
    """Return the `model` setting or, if unset, the best catalog model that fits in free memory."""
    return str(settings.get("model") or best_model().name)


def warn_if_busy(n_threads: int | None) -> None:
    """Warn if other programs leave too few CPUs for reliable timings on `n_threads` threads."""
    if n_busy := busy_cpus(n_threads or default_threads()):
        warn(f"Other programs are using {n_busy:.1f} CPUs, so the times are unreliable.")


@dataclass(frozen=True)
class Opener:
    """A callable that opens models with a command's options.

    A call that names a different model ignores --sidecar and --mmproj.
    """

    model: str
    options: ModelOptions
    n_parallel: int | None = 1
    prompt_cache: PromptCache | None = None

    def __call__(self, name: str | None = None, n_ctx: int | None = None) -> PopModel:
        options = self.options
        engine_options = EngineOptions(
            model=name or self.model,
            sidecar=None if name else options.sidecar,
            mmproj=None if name else options.mmproj,
            image_tokens=options.image_tokens,
            keep_states=options.refill != "off",
            parse_special=options.parse_special,
            full=options.full,
            reuse=options.reuse,
            prompt_cache=self.prompt_cache,
            context=ContextOptions(
                n_ctx=n_ctx or options.ctx,
                n_parallel=self.n_parallel,
                **options.cache_types,
                **vars(options.hardware),
            ),
        )
        with terminal_watch() as watch:
            opened = open_model(engine_options, watch)
        if engine_options.mmproj:
            opened.engine.prompter.open_vision()  # reports a wrong mmproj at load time
        files = opened.engine.context.files
        if files.meta is None and not options.full:
            note_conversion(files.path)
        return opened


@cache
def note_conversion(path: Path) -> None:
    """Print once for each model how to make it read faster, unless it cannot be converted."""
    with suppress(PopError):
        seconds = sidecar_seconds(read_source(path))
        note(
            f"To read prompts faster, run pop-local convert {path} --sidecar once. This takes about"
            f" {duration(seconds)} on this machine."
        )


def open_prompt_cache(options: ModelOptions, ram_bytes: int = 0) -> PromptCache | None:
    """Return an in-memory and on-disk cache of earlier prompts, or None if both sizes are 0."""
    store = None
    if options.cache_disk:
        store = DiskStore(settings.prompts_dir(), options.cache_disk * 2**30)
        note(f"pop-local stores prompts in {store.folder} (up to {options.cache_disk} GiB).")
    return PromptCache(ram_bytes, store) if ram_bytes or store is not None else None


def store_prompts(model: PopModel) -> None:
    """Store the model's cached prompts on disk if requested. The model must still be open."""
    prompts = model.engine.options.prompt_cache
    if prompts is not None:
        for sequence in model.engine.sequences:
            sequence.states.store()
        prompts.close()
