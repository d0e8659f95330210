"""Options that several commands share, and what they turn into."""

import math
import os
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pop_converter.fit.least_squares import RIDGE, KvType, Weighting
from pop_converter.popfile.plan import parse_skip
from pop_local.base.errors import PlanError, PopError
from pop_local.calibration.options import FitOptions
from pop_local.config.settings import MOST, MOST_SEED, load
from pop_local.engine.llama.rpc import address
from pop_local.ui.theme import warn
from pop_local.workflows.options import Boundary, Hardware, Skip


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


def _no_more_than_cores(call: typer.Context, n_threads: int | None) -> int | None:
    n_cores = os.cpu_count()
    if n_threads is None or n_cores is None or n_threads <= n_cores:
        return n_threads
    if "threads" in given_names(call):
        raise typer.BadParameter(f"{n_threads} is too many: this machine has {n_cores} cores")
    # A setting may be shared by several machines.
    where = next(value.where for value in load() if value.key == "threads")
    warn(f"{where}: threads is {n_threads}, but this machine has {n_cores} cores: all are used")
    return n_cores


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        callback=_no_more_than_cores,
        help="CPU threads. Default: the physical cores.",
    ),
]
Ctx = Annotated[
    int | None,
    typer.Option(
        "--ctx", min=1, max=MOST, help="Context in tokens. Default: the model's, at most 8192."
    ),
]
# The parameter must not be called ctx: the setting of that name is for conversations.
MeasuredCtx = Annotated[
    int | None,
    typer.Option(
        "--ctx", min=1, max=MOST, help="Context in tokens. Default: what is measured needs."
    ),
]
GpuLayers = Annotated[
    int,
    typer.Option(
        "--gpu-layers", min=-1, max=MOST, help="Layers on the GPU; -1 for all, 0 for none."
    ),
]
Rpc = Annotated[
    str | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT,...",
        help="Machines that hold the layers, each with `pop-local rpc-server` running.",
    ),
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
    int | None,
    typer.Option(
        "--seed", min=0, max=MOST_SEED, help="Makes an answer repeatable. Default: chance."
    ),
]
Theme = Annotated[
    str,
    typer.Option(
        "--theme",
        help="Of answers in a terminal: terminal (its own colours), dark, light, plain,"
        " or a style of Pygments.",
    ),
]
ParseSpecial = Annotated[
    bool,
    typer.Option(
        "--parse-special",
        help="Special tokens that messages and documents spell out act as such: only for text that"
        " you trust.",
    ),
]
NoPop = Annotated[bool, typer.Option("--no-pop", help="Read prompts in full, without pruning.")]
Pop = Annotated[
    Path | None,
    typer.Option(
        "--pop",
        metavar="SIDECAR",
        help="The model's sidecar. Default: NAME.pop-sidecar.gguf beside it, or one that comes with"
        " pop-local.",
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option(
        "--mmproj",
        metavar="FILE",
        help="What lets the model see pictures. Default: the mmproj*.gguf beside it, if there is"
        " one.",
    ),
]
ImageTokens = Annotated[
    int | None,
    typer.Option(
        "--image-tokens",
        metavar="MAX",
        min=1,
        max=MOST,
        help="The most that one picture takes, with models where that varies.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw it.")]
ReplacePlot = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing plot.")]

DEFAULT_THEME = "terminal"


def sampling(**options: Any) -> dict[str, Any]:
    """The options that were given; the engine has its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


def hardware(threads: int | None, gpu_layers: int, rpc: str | None) -> Hardware:
    """What --threads, --gpu-layers and --rpc say; a malformed address is wrong usage."""
    servers = tuple(name.strip() for name in rpc.split(",")) if rpc else ()
    try:
        for name in servers:
            address(name)
    except PopError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}", param_hint="--rpc") from error
    return Hardware(threads, gpu_layers, servers)


# How deep

BoundaryLayer = Annotated[
    int | None, typer.Option(metavar="LAYER", help="The first layer to skip, instead of --skip.")
]


Select = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Context tokens to run in full because the question needs them: 10%, 0 for none."
        " Default: what the file says.",
    ),
]


class RefillName(str, Enum):
    """When pruned tokens run the layers that they skipped."""

    IDLE = "idle"
    ANSWER = "answer"
    OFF = "off"


Refill = Annotated[
    RefillName,
    typer.Option(
        "--refill",
        help="When pruned tokens run the skipped layers: while nothing is asked, also with each"
        " token of an answer, or never.",
    ),
]


def selected(text: str | None) -> float | None:
    """A share of the context tokens, as 10% or 0.1."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter("give a share, as 10% or 0.1", param_hint="--select")
    return value


def share(text: str, option: str) -> Skip:
    """A share of the layers; what cannot be one is wrong usage of the option."""
    try:
        parse_skip(text)
    except PlanError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}", param_hint=option) from error
    return Skip(text)


def named_depth(skip: str | None, boundary: int | None) -> Skip | Boundary | None:
    """What --skip or --boundary says; None where neither was given."""
    if skip is not None and boundary is not None:
        raise typer.BadParameter("give one of --skip and --boundary", param_hint="--boundary")
    if skip is not None:
        return share(skip, "--skip")
    return None if boundary is None else Boundary(boundary)


# The fit


Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", min=1, help="Tokens to fit on. Default: 24 per dimension, 16384 at least."
    ),
]
KvTypeOption = Annotated[
    KvType | None, typer.Option("--kv-type", help="Type of the fitted weights. Default: q8_0.")
]
Ridge = Annotated[
    float | None,
    typer.Option(
        "--ridge",
        min=0.0,
        callback=finite,
        help=f"Pull of the fit toward the layers' own projections. Default: {RIDGE}.",
    ),
]
WeightingOption = Annotated[
    Weighting | None,
    typer.Option(
        "--weighting",
        help="Whether tokens count by the attention they receive. Default: attention.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="GB",
        min=0.0,
        max=1e9,
        callback=finite,
        help="For the fit's sums. Default: half of what is free.",
    ),
]


def given_names(call: typer.Context) -> set[str]:
    """Return the names of the options that the command line has."""
    names = (option.name or "" for option in call.command.params)
    sources = {name: call.get_parameter_source(name) for name in names}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def lengths(text: str, option: str, *, least: int) -> tuple[int, ...]:
    """Parse N,N,... in tokens."""
    with suppress(ValueError):
        found = tuple(int(part) for part in text.split(","))
        if min(found) >= least:
            return found
    raise typer.BadParameter(
        f"{text!r} is not a list of lengths from {least} on, such as 512,2048", param_hint=option
    )


def given_fit(memory_gb: float | None, **options: Any) -> FitOptions | None:
    """The options of the fit that were given, the others by default; None where none was."""
    memory_bytes = None if memory_gb is None else int(memory_gb * 10**9)
    given = sampling(**options, memory_bytes=memory_bytes)
    return FitOptions(**given) if given else None


def no_fit(given: FitOptions | None, of: str) -> None:
    """Wrong usage if options of the fit were given: `of` says why they belong to nothing."""
    if given is not None:
        raise typer.BadParameter(f"options of the fit were given, but {of}")
