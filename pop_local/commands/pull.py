"""`pop-local pull MODEL`: fetch a model from the catalog, a hub or a URL."""

import re
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from pop_converter.base.errors import PopError
from pop_local.commands.shared_options import Force
from pop_local.fetching.http_download import fetch_url, file_name
from pop_local.fetching.hub_download import search_hub
from pop_local.models.model_names import hub_names, is_url, load_catalog, models_dir
from pop_local.ui.console import note, say, warn
from pop_local.ui.tables import Column, print_table
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.events import Unit
from pop_local.workflows.fetch import fetch_named

_NAMES = (Column("Name", itemgetter(0)), Column("On the hub", itemgetter(1)))


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A known name, hf:OWNER/REPO[:FILE], or the URL of a GGUF file (default: list the"
            " known names). FILE may be part of the file's name, as in hf:OWNER/REPO:Q4_K_M.",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Target folder (default: the models folder).")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HASH", help="Expected SHA-256 of the file at the URL.")
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
    if sha256 is not None and not is_url(model):
        message = "--sha256 works only with a URL; remove --sha256"
        raise typer.BadParameter(message, param_hint="--sha256")
    folder = folder or models_dir()
    try:
        if is_url(model):
            path = _from_url(model, folder, _hash(sha256), force=force)
        else:
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


def _from_url(url: str, folder: Path, sha256: str, *, force: bool) -> Path:
    if not sha256:
        is_plain = url.lower().startswith("http:")
        more = ", and http:// is not encrypted" if is_plain else ""
        warn(f"Without --sha256, the file is not verified{more}.")
    with terminal_watch() as watch:
        advance = watch.stage(f"Fetching {file_name(url)}", Unit.BYTES)
        return fetch_url(url, folder, sha256, advance, force=force)


def _hash(text: str | None) -> str:
    if text is None:
        return ""
    digits = text.strip().lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise PopError(f"{text!r} is not a SHA-256 hash", "pass 64 hexadecimal digits")
    return digits
