"""`pop-local pull MODEL`: download a model from the catalog or a hub."""

from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from pop_base.numbers import size
from pop_local.models.model_names import CatalogModel, hub_names, load_catalog, models_dir
from pop_local.models.sidecars import SHIPPED, SUFFIX
from pop_local.ui.console import note, say
from pop_local.ui.tables import Column, print_sentence, print_table
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.pull import fetch_named

_CATALOG = (
    Column("Name", lambda model: model.short_name),
    Column("Size", lambda model: size(model.size_bytes), numeric=True),
    Column("RAM", lambda model: size(model.ram_bytes), numeric=True),
    Column("Kind", lambda model: model.kind),
    Column("Fast", lambda model: "yes" if _has_sidecar(model) else "no"),
    Column("License", lambda model: model.license.partition(" (")[0]),
)
_HUB = (Column("Name", itemgetter(0)), Column("On the hub", itemgetter(1)))


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model name, hf:OWNER/REPO[:FILE], or a Hugging Face Hub URL. FILE may be"
            " part of a file name, as in hf:OWNER/REPO:Q4_K_M. Omit MODEL to list all names.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Target folder (default: the models folder)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Download a model, check its hash, and print its path.

    After an interruption, the download resumes if the server supports resuming.
    """
    if model is None:
        print_table(_CATALOG, load_catalog())
        print_sentence("")
        print_table(_HUB, [*hub_names().items()])
        note("Before downloading a model from the hub, `pull` shows the model's size and license.")
        return
    try:
        with terminal_watch() as watch:
            # Running `pull` is consent.
            watch = replace(watch, may=lambda question: True, refuses=lambda question: False)
            path = fetch_named(model, folder or models_dir(), watch, force=force)
    except KeyboardInterrupt:
        note("Run the same command again to resume the download.")
        raise
    say(str(path))


def _has_sidecar(model: CatalogModel) -> bool:
    return (SHIPPED / f"{Path(model.file).stem}{SUFFIX}").exists()
