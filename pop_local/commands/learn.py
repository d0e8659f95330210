"""`pop-local learn`: delete the statistics collected from prompts."""

from typing import Annotated

import typer

from pop_converter.gguf.source import read_source
from pop_local.models.model_names import resolve
from pop_local.models.sidecars import LearnedFiles, learned_files
from pop_local.ui.console import note
from pop_local.ui.lazy import sub_app

learn = sub_app(no_args_is_help=True)


@learn.callback()
def about() -> None:
    """Delete the statistics collected from your prompts.

    The statistics are sums over tokens and contain no text. `chat` and `serve` learn while they are
    idle, unless --learn is off. In Python, PopModel.open(..., learn=True) turns learning on.
    """


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
