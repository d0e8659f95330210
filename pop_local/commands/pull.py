"""`pop-local pull MODEL`: fetch a model from the catalog or a hub."""

from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from pop_converter.base.errors import PopError
from pop_local.commands.shared_options import Force
from pop_local.fetching.hub_download import search_hub
from pop_local.models.model_names import hub_names, load_catalog, models_dir
from pop_local.ui.console import note, say
from pop_local.ui.tables import Column, print_table
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.fetch import fetch_named

_NAMES = (Column("Name", itemgetter(0)), Column("On the hub", itemgetter(1)))


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A known name, hf:OWNER/REPO[:FILE], or a URL of the Hugging Face Hub (default:"
            " list the known names). FILE may be part of the file's name, as in"
            " hf:OWNER/REPO:Q4_K_M.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Target folder (default: the models folder)."),
    ] = None,
    force: Force = False,
) -> None:
    """Fetch a model, check its hash and print its path.

    An interrupted download resumes if the server supports it. If the name is unknown, the command
    searches the hub for it.
    """
    if model is None:
        catalog = ((each.short_name, each.source) for each in load_catalog())
        print_table(_NAMES, (*catalog, *hub_names().items()))
        return
    folder = folder or models_dir()
    try:
        with terminal_watch() as watch:
            may = replace(watch, may=lambda question: True)  # running `pull` is consent
            path = fetch_named(model, folder, may, force=force)
    except KeyboardInterrupt:
        note("Run the same command again to resume the download.")
        raise
    except PopError as error:
        if error.cause == "unknown-model":
            _show_hits(model)
        raise
    say(str(path))


def _show_hits(name: str) -> None:
    try:
        for repo in search_hub(name):
            note(f"pop-local pull hf:{repo}")
    except PopError as error:
        note(f"Could not search the hub for {name}: {error.message}.")
