"""`pop-local list`: list the local models."""

from pop_converter.base.numbers import size
from pop_local.commands.shared_options import Json
from pop_local.models.model_files import StoredModel, stock
from pop_local.models.model_names import models_dirs, not_fetched
from pop_local.ui.console import note
from pop_local.ui.tables import Column, print_json, print_table

_COLUMNS = (
    Column("Model", lambda model: model.name),
    Column("Size", lambda model: size(model.size_bytes), numeric=True),
    Column("Architecture", lambda model: model.architecture),
    Column("Boundary", lambda model: model.boundary, numeric=True),
    Column("K/V", lambda model: model.projection),
    Column("Sidecar", lambda model: model.sidecar and model.sidecar.name),
    Column("Problem", lambda model: model.problem),
)


def list(json: Json = False) -> None:  # noqa: A001
    """List the local models and their problems, and the models that can be fetched by name.

    Commands with a MODEL argument accept the listed names. `chat` and `run` fetch missing models.
    """
    folders, catalog = models_dirs(), not_fetched()
    models = tuple(model for folder in folders for model in stock(folder))
    absent = tuple(
        StoredModel(each.short_name, (), size_bytes=each.size_bytes, problem="not fetched")
        for each in catalog
    )
    if json:
        fetchable = [{"name": each.name, "size_bytes": each.size_bytes} for each in absent]
        print_json({"folder": folders[0], "models": models, "not_fetched": fetchable})
        return
    where = " and ".join(map(str, folders))
    note(f"In {where}:" if models else f"No models in {where} yet.")
    if absent:
        note(f"Fetch a missing model by its name, for example: pop-local pull {absent[0].name}")
    shown = models + absent
    # Omit empty columns.
    print_table([each for each in _COLUMNS if {*map(each.cell, shown)} - {None, ""}], shown)
