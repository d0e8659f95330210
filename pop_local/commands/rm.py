"""`pop-local rm NAME...`: remove models from the models folder."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pop_base.errors import PopError
from pop_base.numbers import size
from pop_local.commands.shared_options import Json
from pop_local.models.mmproj_files import orphans
from pop_local.models.model_files import parts_folder, removable, total_bytes
from pop_local.models.model_names import lookup, models_dirs
from pop_local.ui.console import note, say
from pop_local.ui.tables import print_json


def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Model names, as shown by `pop-local list`."),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without confirmation.")] = False,
    json: Json = False,
) -> None:
    """Remove models, converted copies, or unfinished downloads from the models folder.

    The command also removes the model's sidecar and any mmproj named after the model. A catalog
    name refers to both the model and its converted copy. Any other name refers to one file.
    """
    # Look up every name before deleting anything.
    files = tuple(dict.fromkeys(file for name in names for file in _found(name)))
    files += tuple(file for folder in models_dirs() for file in orphans(folder, files))
    freed_bytes = total_bytes(files)
    if not yes:
        _ask(files, freed_bytes)
    for file in files:
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
    if json:
        print_json({"files": files, "freed_bytes": freed_bytes})
        return
    for file in files:
        say(f"Removed {file}")
    say(f"Freed {size(freed_bytes)}")


def _found(name: str) -> tuple[Path, ...]:
    """Return the files named `name` from the first folder that contains any. Raises PopError."""
    first, *others = models_dirs()
    try:
        return _files(first, name)
    except PopError:
        for folder in others:
            with suppress(PopError):
                return _files(folder, name)
        raise


def _files(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files named `name` or, if none exist, the files of the catalog model `name`."""
    try:
        return removable(folder, name)
    except PopError:
        if (entry := lookup(name)) is None:
            raise
        fetched = (entry.file, entry.pop_file, parts_folder(folder / entry.file).name)
        here = [file for file in fetched if os.path.lexists(folder / file)]
        if not here:
            raise
    return tuple(file for stored in here for file in removable(folder, stored))


def _ask(files: tuple[Path, ...], freed_bytes: int) -> None:
    if not sys.stdin.isatty():
        raise PopError("refusing to delete without confirmation", "pass --yes")
    for file in files:
        note(str(file))
    question = f"Remove {len(files)} file{'s' if len(files) > 1 else ''} ({size(freed_bytes)})?"
    if not typer.confirm(question, err=True):
        raise PopError("nothing was removed")
