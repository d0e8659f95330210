"""`pop-local pull MODEL`: fetch a model of the catalog, from a hub or from a URL."""

import re
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_local.fetching.hub import search_hub
from pop_local.fetching.url import fetch_url, file_name
from pop_local.measure.budget import BALANCED
from pop_local.models.model_names import hub_names, is_url, load_catalog, models_dir
from pop_local.models.sidecars import sidecar_of
from pop_local.ui.tables import Column, print_table
from pop_local.ui.theme import note, say, warn
from pop_local.ui.views.conversion import fit_facts
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.goals import Within
from pop_local.workflows.events import Unit
from pop_local.workflows.fetch import fetch_named

_NAMES = (Column("Name", itemgetter(0)), Column("On the hub", itemgetter(1)))
_STOPPED = "Run the same command again to resume."


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A known name (listed if MODEL is missing), hf:OWNER/REPO[:FILE], or the URL of a"
            " GGUF file. FILE may be part of a name: hf:OWNER/REPO:Q4_K_M",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Target folder (default: the models folder).")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HASH", help="Expected hash of a URL's file.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace an existing file with that name.")
    ] = False,
) -> None:
    """Fetch a model, check its hash and print its path.

    An interrupted download resumes if the server supports it. The hub is searched for unknown
    names.
    """
    if model is None:
        print_table(_NAMES, _known())
        return
    if sha256 is not None and not is_url(model):
        raise typer.BadParameter("only for URLs; other hashes are known", param_hint="--sha256")
    folder = folder or models_dir()
    try:
        path = _fetched(model, folder, sha256, force=force)
    except KeyboardInterrupt:
        note(_STOPPED)
        raise
    except PopError as error:
        if error.cause == "unknown-model":
            _show_hits(model)
        raise
    _tell_needs(path)
    say(str(path))


def _known() -> tuple[tuple[str, str], ...]:
    catalog = ((each.short_name, each.source) for each in load_catalog())
    return (*catalog, *hub_names().items())


def _show_hits(name: str) -> None:
    try:
        for repo in search_hub(name):
            note(f"pop-local pull hf:{repo}")
    except PopError as error:
        note(f"Could not search the hub for {name}: {error.message}.")


def _tell_needs(path: Path) -> None:
    """Print the cost of `convert`, unless the model has a sidecar."""
    with suppress(PopError):  # opening the model reports it
        if sidecar_of(read_source(path)) is None:
            options = ConvertOptions(Within(BALANCED), output="sidecar")
            planned = plan_conversion(path, None, options)
            for label, value in fit_facts(planned):
                note(f"`pop-local convert`, {label.lower()}: {value}.")


def _fetched(model: str, folder: Path, sha256: str | None, *, force: bool) -> Path:
    if is_url(model):
        return _from_url(model, folder, _hash(sha256), force=force)
    with terminal_watch() as watch:
        may = replace(watch, may=lambda question: True)  # the command itself is the permission
        return fetch_named(model, folder, may, force=force)


def _from_url(url: str, folder: Path, sha256: str, *, force: bool) -> Path:
    if not sha256:
        unsafe = ", and http:// is not encrypted" if url.lower().startswith("http:") else ""
        warn(f"Without --sha256 the file is not verified{unsafe}.")
    with terminal_watch() as watch:
        advance = watch.stage(f"Fetching {file_name(url)}", Unit.BYTES)
        return fetch_url(url, folder, sha256, advance, force=force)


def _hash(text: str | None) -> str:
    if text is None:
        return ""
    digits = text.strip().lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise PopError(f"{text!r} is not a SHA-256 hash", "give 64 hexadecimal digits")
    return digits
