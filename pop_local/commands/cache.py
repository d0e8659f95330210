"""`pop-local cache`: remove the stored KV caches of earlier prompts."""

import typer

from pop_local.config import settings
from pop_local.engine.cache.disk_store import clear_folder
from pop_local.ui.console import note

cache = typer.Typer(no_args_is_help=True, add_completion=False)


@cache.callback()
def about() -> None:
    """Remove the stored KV caches of earlier prompts.

    `chat`, `run`, and `serve` store KV caches if you pass --cache-disk or set cache_disk.
    """


@cache.command()
def clear() -> None:
    """Remove all stored prompts."""
    folder = settings.prompts_dir()
    n = clear_folder(folder)
    note(f"Removed {n} stored prompt{'' if n == 1 else 's'} from {folder}.")
