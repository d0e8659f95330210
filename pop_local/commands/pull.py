"""`pop-local pull NAME`: fetch a model of the catalog."""

from pathlib import Path
from typing import Annotated

import typer

from pop_local.models import fetch, find
from pop_local.ui.progress import bytes_progress
from pop_local.ui.theme import note, out


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The model's name in the catalog, or its alias.")
    ],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to put it, instead of the models folder.")
    ] = None,
) -> None:
    """Fetch a model of the catalog, check its hash, and print where it lies."""
    model = find(name)
    note(f"{model.name}: licence {model.licence}")
    with bytes_progress(f"Fetching {model.name}") as advance:
        path = fetch(name, advance, folder)
    out.print(path, soft_wrap=True, markup=False)
