"""`pop-local list`: list the local models."""

from pop_base.numbers import size
from pop_local.commands.shared_options import Json
from pop_local.models.model_files import StoredModel, stock
from pop_local.models.model_names import load_catalog, models_dirs, not_fetched
from pop_local.ui.console import note
from pop_local.ui.tables import Column, print_json, print_table

_COLUMNS = (
    Column("Model", lambda model: model.name),
    Column("Short name", lambda model: _short_name(model)),
    Column("Size", lambda model: size(model.size_bytes), numeric=True),
    Column("Fast reading", lambda model: "yes" if model.boundary else None),
    Column("Problem", lambda model: model.problem),
)
_FOLDER = Column("Folder", lambda model: model.files[0].parent if model.files else None)


def _short_name(model: StoredModel) -> str | None:
    file = model.files[0].name if model.files else ""
    return next((entry.short_name for entry in load_catalog() if entry.file == file), None)


def list(json: Json = False) -> None:  # noqa: A001
    """List the local models, any problems with them, and the models that you can download by name.

    Commands with a MODEL argument accept these names. `chat` and `run` download missing models.
    """
    folders, catalog = models_dirs(), not_fetched()
    models = tuple(model for folder in folders for model in stock(folder))
    absent = tuple(
        StoredModel(entry.short_name, (), size_bytes=entry.size_bytes, problem="not downloaded")
        for entry in catalog
    )
    if json:
        fetchable = [{"name": entry.name, "size_bytes": entry.size_bytes} for entry in absent]
        print_json({"folder": folders[0], "models": models, "not_fetched": fetchable})
        return
    where = " and ".join(map(str, folders))
    note(f"In {where}:" if models else f"There are no models in {where} yet.")
    rows = models + absent
    columns = [column for column in _COLUMNS if {*map(column.cell, rows)} - {None, ""}]
    if len({model.name for model in models}) < len(models):
        columns.insert(1, _FOLDER)
    print_table(columns, rows)
    if absent:
        note(f"To download a model, pass its name, for example: pop-local pull {absent[0].name}")
