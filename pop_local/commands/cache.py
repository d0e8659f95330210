"""`pop-local cache`: show or remove the stored KV caches of earlier prompts."""

from datetime import datetime

from pop_converter.base.numbers import size
from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.engine.cache.disk_store import DiskStore
from pop_local.ui.console import note
from pop_local.ui.lazy import sub_app
from pop_local.ui.tables import Column, print_json, print_table

cache = sub_app(no_args_is_help=True)

_COLUMNS = (
    Column("Tokens", lambda found: f"{found['n_tokens']:,}", numeric=True),
    Column("Size", lambda found: size(found["size_bytes"]), numeric=True),
    Column("Last used", lambda found: found["used"]),
)


@cache.callback()
def about() -> None:
    """Show or remove the stored KV caches of earlier prompts.

    `chat`, `run` and `serve` store them if --cache-disk or the setting cache_disk is given.
    """


@cache.command()
def show(json: Json = False) -> None:
    """Show the stored prompts: tokens, size and last use."""
    found = [
        {
            "path": str(each.path),
            "n_tokens": len(each.tokens),
            "size_bytes": each.size_bytes,
            "used": datetime.fromtimestamp(each.used_s).isoformat(" ", "minutes"),
        }
        for each in _store().stored()
    ]
    if json:
        print_json({"folder": str(settings.prompts_dir()), "prompts": found})
        return
    if not found:
        note("No prompts are stored.")
        return
    print_table(_COLUMNS, found)
    total = sum(int(str(each["size_bytes"])) for each in found)
    note(f"{size(total)} in {settings.prompts_dir()}")


@cache.command()
def clear() -> None:
    """Remove all stored prompts."""
    n = _store().clear()
    note(f"Removed {n} stored prompt{'' if n == 1 else 's'} from {settings.prompts_dir()}.")


def _store() -> DiskStore:
    return DiskStore(settings.prompts_dir(), 0)
