"""`pop-local rm NAME...`: remove models from the models folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pop_converter.errors import PopError

from pop_local.models import lookup, models_dir
from pop_local.stored import removable, total_bytes
from pop_local.ui.tables import print_json, size
from pop_local.ui.theme import note, say


@dataclass(frozen=True)
class Removal:
    """What `--json` prints."""

    files: tuple[Path, ...]
    freed_bytes: int


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="As `pop-local list` shows them, or of the catalog."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Remove models, converted copies or unfinished downloads from the models folder.

    A model goes with its sidecar; its converted copy is a model of its own and stays, unless the
    name is one of the catalog, which stands for both.
    """
    folder = models_dir()
    # All names are looked up before anything goes; one given twice goes once.
    stored = [each for name in names for each in _stored_names(folder, name)]
    files = tuple(dict.fromkeys(file for name in stored for file in removable(folder, name)))
    freed_bytes = total_bytes(files)
    if not yes:
        _ask(files, freed_bytes)
    for file in files:
        file.unlink()
    if json:
        print_json(Removal(files, freed_bytes))
        return
    for file in files:
        say(f"Removed {file}")
    say(f"Freed {size(freed_bytes)}")


def _stored_names(folder: Path, name: str) -> tuple[str, ...]:
    """Of what was fetched by a name of the catalog, and converted from that; else the name."""
    entry = lookup(name)
    known = () if entry is None else (entry.file, entry.pop_file)
    return tuple(file for file in known if (folder / file).exists()) or (name,)


def _ask(files: tuple[Path, ...], freed_bytes: int) -> None:
    if not sys.stdin.isatty():
        raise PopError("nobody can be asked whether to remove it", "to remove it unasked: --yes")
    for file in files:
        note(str(file))
    question = f"Remove {len(files)} file{'s' if len(files) > 1 else ''} ({size(freed_bytes)})?"
    if not typer.confirm(question, err=True):
        raise PopError("nothing was removed")
