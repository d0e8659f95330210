"""`pop-local learn`: show or delete the statistics learned from prompts."""

from typing import Annotated, Any

import typer

from pop_converter.base.numbers import size
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import sidecar_meta
from pop_local.commands.shared_options import Json
from pop_local.engine.learning.sums import SumsFile
from pop_local.models.model_names import resolve
from pop_local.models.sidecars import LearnedFiles, learned_files
from pop_local.ui.console import note
from pop_local.ui.lazy import sub_app
from pop_local.ui.tables import Column, print_json, print_table

learn = sub_app(no_args_is_help=True)

_COLUMNS = (
    Column("Model", lambda found: found["model"]),
    Column("Tokens", lambda found: f"{found['n_tokens']:,}", numeric=True),
    Column("Boundaries", lambda found: ", ".join(map(str, found["boundaries"]))),
    Column("Size", lambda found: size(found["size_bytes"]), numeric=True),
    Column("Skipped from", lambda found: found["pruned_from"]),
)


@learn.callback()
def about() -> None:
    """Show or delete the statistics learned from your prompts.

    The statistics are sums over tokens and contain no text. `chat` and `serve` learn while they are
    idle, unless --learn is off. In Python, PopModel.open(..., learn=True) turns learning on.
    """


@learn.command()
def show(json: Json = False) -> None:
    """Show each model's learned statistics: tokens, boundaries and size."""
    found = [_shown(each) for each in learned_files()]
    if json:
        print_json({"learned": found})
    elif found:
        print_table(_COLUMNS, found)
    else:
        note("pop-local has not learned any statistics yet.")


def _shown(files: LearnedFiles) -> dict[str, Any]:
    n_rows = SumsFile(files.sums, "").rows()
    sidecar = files.sidecar
    return {
        "model": files.name,
        "n_tokens": max(n_rows.values(), default=0),
        "boundaries": sorted(n_rows),
        "size_bytes": files.size_bytes,
        "pruned_from": sidecar_meta(read_header(sidecar)).boundary if sidecar.exists() else None,
    }


@learn.command()
def forget(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A GGUF file or a model name (default: all models)."),
    ] = None,
) -> None:
    """Delete learned statistics and the sidecars computed from them."""
    wanted = None if model is None else LearnedFiles.of(read_source(resolve(model, base=True)))
    forgotten = [each for each in learned_files() if wanted in (None, each)]
    for each in forgotten:
        each.forget()
    names = ", ".join(each.name for each in forgotten)
    note(f"Deleted: {names}." if names else "There are no statistics to delete.")
