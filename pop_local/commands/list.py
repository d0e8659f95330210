"""`pop-local list`: the models that are here."""

from dataclasses import dataclass
from pathlib import Path

from pop_local.commands.options import Json
from pop_local.models.names import models_dir
from pop_local.models.sizes import size
from pop_local.models.stored import Stored, stock
from pop_local.ui.tables import Column, Table, print_json, print_table
from pop_local.ui.theme import note

_COLUMNS = (
    Column("name", "Model"),
    Column("size_bytes", "Size", size, numeric=True),
    Column("architecture", "Architecture"),
    Column("boundary", "Boundary", numeric=True),
    Column("projection", "K/V"),
    Column("sidecar", "Sidecar", lambda path: path.name if path else ""),
    Column("problem", "Problem"),
)


@dataclass(frozen=True)
class Listing:
    """What `--json` prints."""

    folder: Path
    models: tuple[Stored, ...]


def list(  # noqa: A001
    json: Json = False,
) -> None:
    """Show the models folder: sizes, architectures, boundaries, what is damaged.

    Any name shown here can be given wherever a command takes a model.
    """
    listing = Listing(models_dir(), stock(models_dir()))
    if json:
        print_json(listing)
        return
    note(f"In {listing.folder}:" if listing.models else f"No models in {listing.folder} yet.")
    if not listing.models:
        note("`pop-local pull smollm2` fetches a small one.")
        return
    print_table(_table(listing.models))


def _table(models: tuple[Stored, ...]) -> Table:
    """Without the columns that have nothing to say."""
    columns = tuple(column for column in _COLUMNS if any(_said(m, column) for m in models))
    rows = tuple(tuple(getattr(m, column.key) for column in columns) for m in models)
    return Table(columns, rows)


def _said(model: Stored, column: Column) -> bool:
    return getattr(model, column.key) not in (None, "")
