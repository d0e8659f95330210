"""`pop-local list`: the models that are here."""

from pop_local.base.numbers import size
from pop_local.commands.options import Json
from pop_local.models.names import models_dir
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


def list(  # noqa: A001
    json: Json = False,
) -> None:
    """Show the models folder: sizes, architectures, boundaries, what is damaged.

    Any name shown here can be given wherever a command takes a model.
    """
    folder = models_dir()
    models = stock(folder)
    if json:
        print_json({"folder": folder, "models": models})
    elif models:
        note(f"In {folder}:")
        print_table(_table(models))
    else:
        note(f"No models in {folder} yet.")
        note("`pop-local pull smollm2` fetches a small one.")


def _table(models: tuple[Stored, ...]) -> Table:
    """Without the columns that have nothing to say."""
    columns = tuple(
        column for column in _COLUMNS if {getattr(m, column.key) for m in models} - {None, ""}
    )
    return Table(columns, tuple(tuple(getattr(m, c.key) for c in columns) for m in models))
