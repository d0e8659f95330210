"""Options that several commands share, and what they turn into."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from converter.errors import PlanError
from converter.plan import Share, parse_skip


def finite(value: float | None) -> float | None:
    """Callback of every option that is a float: ranges let nan through, and inf without a `max`."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def positive(value: float | None) -> float | None:
    """As `finite`, for what nothing measured could reach at zero."""
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} leaves nothing to allow: give more than 0")
    return finite(value)


def share(text: str, option: str) -> Share:
    """As `parse_skip`; what it refuses is wrong usage of the option."""
    try:
        return parse_skip(text)
    except PlanError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}", param_hint=option) from error


Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: the physical cores.")
]
Ctx = Annotated[
    int | None,
    typer.Option("--ctx", min=1, help="Context in tokens. Default: the model's, at most 8192."),
]
# The parameter must not be called ctx: the setting of that name is for conversations.
MeasuredCtx = Annotated[
    int | None,
    typer.Option("--ctx", min=1, help="Context in tokens. Default: what is measured needs."),
]
GpuLayers = Annotated[
    int, typer.Option("--gpu-layers", min=-1, help="Layers on the GPU; -1 for all, 0 for none.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Longest answer. Default: what the context holds."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, callback=finite, help="0 always takes the likeliest token."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, callback=finite, help="Nucleus sampling."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Makes an answer repeatable. Default: chance.")
]
Theme = Annotated[
    str,
    typer.Option(
        "--theme",
        help="Of answers in a terminal: terminal (its own colours), dark, light, plain,"
        " or a style of Pygments.",
    ),
]
NoPop = Annotated[bool, typer.Option("--no-pop", help="Read prompts in full, without pruning.")]

Pop = Annotated[
    Path | None,
    typer.Option(
        "--pop",
        metavar="SIDECAR",
        help="The model's sidecar. Default: NAME.pop-sidecar.gguf beside it, if there is one.",
    ),
]

DEFAULT_THEME = "terminal"


def sampling(**options: Any) -> dict[str, Any]:
    """The options that were given; the engine has its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}
