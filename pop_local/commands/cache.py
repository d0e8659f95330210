"""`pop-local cache`: show or remove the stored KV caches of earlier prompts."""

from datetime import datetime

from pop_converter.base.numbers import size
from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.engine.cache.disk_store import DiskStore, StoredState
from pop_local.ui.console import note
from pop_local.ui.lazy import sub_app
from pop_local.ui.tables import Column, print_json, print_table

cache = sub_app(no_args_is_help=True)

_COLUMNS = (
    Column("Tokens", lambda stored: f"{len(stored.tokens):,}", numeric=True),
    Column("Size", lambda stored: size(stored.size_bytes), numeric=True),
    Column("Last used", lambda stored: _used(stored)),
)


def _used(stored: StoredState) -> str:
    return datetime.fromtimestamp(stored.used_s).isoformat(" ", "minutes")


@cache.callback()
def about() -> None:
    """Show or remove the stored KV caches of earlier prompts.

    `chat`, `run` and `serve` store KV caches if you pass --cache-disk or set cache_disk.
    """


@cache.command()
def show(json: Json = False) -> None:
    """Show the length, size and last use of each stored prompt."""
    store = DiskStore(settings.prompts_dir())
    found = store.stored()
    if json:
        prompts = [
            {
                "path": each.path,
                "n_tokens": len(each.tokens),
                "size_bytes": each.size_bytes,
                "used": _used(each),
            }
            for each in found
        ]
        print_json({"folder": store.folder, "prompts": prompts})
        return
    if found:
        print_table(_COLUMNS, found)
        note(f"The stored prompts take up {size(store.size_bytes)} in {store.folder}.")
    else:
        note("No prompts are stored.")


@cache.command()
def clear() -> None:
    """Remove all stored prompts."""
    store = DiskStore(settings.prompts_dir())
    n = store.clear()
    note(f"Removed {n} stored prompt{'' if n == 1 else 's'} from {store.folder}.")
