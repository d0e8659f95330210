"""Options that several commands share, in groups that a command takes as one object."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pop_converter.fit.least_squares import KvType
from pop_converter.popfile.plan import parse_skip
from pop_local.base.errors import PlanError, PopError
from pop_local.calibration.options import FitOptions
from pop_local.commands.unfolding import Group
from pop_local.config.settings import MOST, MOST_SEED, load
from pop_local.engine.llama.rpc import address
from pop_local.ui.theme import warn
from pop_local.workflows.options import Hardware

if TYPE_CHECKING:
    from pop_local.workflows.conversion.goals import Named, Skip

DEFAULT_THEME = "terminal"


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


def _usage(error: PopError, option: str) -> typer.BadParameter:
    return typer.BadParameter(f"{error.message}: {error.hint}", param_hint=option)


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        callback=_no_more_than_cores,
        help="CPU threads. Default: the physical cores.",
    ),
]
GpuLayers = Annotated[
    int,
    typer.Option(
        "--gpu-layers", min=-1, max=MOST, help="Layers on the GPU; -1 for all, 0 for none."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw it.")]
ReplacePlot = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing plot.")]
Theme = Annotated[
    str,
    typer.Option(
        "--theme",
        help="Of answers in a terminal: terminal (its own colours), dark, light, plain,"
        " or a style of Pygments.",
    ),
]
System = Annotated[str, typer.Option("--system", help="System prompt.")]
Sidecar = Annotated[
    Path | None,
    typer.Option(
        "--sidecar",
        metavar="PATH",
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


@dataclass(frozen=True)
class ProcessorOptions(Group):
    """The processors of this machine."""

    panel: ClassVar[str] = "Hardware"

    threads: Threads = None
    gpu_layers: GpuLayers = -1

    @property
    def hardware(self) -> Hardware:
        """The same for a workflow."""
        return Hardware(self.threads, self.gpu_layers)


@dataclass(frozen=True)
class HardwareOptions(ProcessorOptions):
    """Processors of this machine and others."""

    rpc: Annotated[
        str | None,
        typer.Option(
            "--rpc",
            metavar="HOST:PORT,...",
            help="Machines that hold the layers, each with `pop-local rpc-server` running.",
        ),
    ] = None

    @property
    def hardware(self) -> Hardware:
        """The same for a workflow; a malformed address is wrong usage."""
        servers = tuple(name.strip() for name in self.rpc.split(",")) if self.rpc else ()
        try:
            for name in servers:
                address(name)
        except PopError as error:
            raise _usage(error, "--rpc") from error
        return Hardware(self.threads, self.gpu_layers, servers)


@dataclass(frozen=True)
class MeasureOptions(HardwareOptions):
    """The model that is measured, but for its name."""

    panel: ClassVar[str] = "Model and hardware"

    sidecar: Sidecar = None
    # It must not be called ctx: the setting of that name is for conversations.
    n_ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx", min=1, max=MOST, help="Context in tokens. Default: what is measured needs."
        ),
    ] = None


@dataclass(frozen=True)
class OpenOptions(HardwareOptions):
    """The model that is talked to, but for its name."""

    panel: ClassVar[str] = "Model and hardware"

    sidecar: Sidecar = None
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx", min=1, max=MOST, help="Context in tokens. Default: the model's, at most 8192."
        ),
    ] = None


@dataclass(frozen=True)
class ModelOptions(OpenOptions):
    """The same, and how it reads."""

    full: Annotated[bool, typer.Option("--full", help="Read prompts in full, without pruning.")] = (
        False
    )
    select: Select = None
    refill: Annotated[
        RefillName,
        typer.Option(
            "--refill",
            help="When pruned tokens run the skipped layers: while nothing is asked, also with each"
            " token of an answer, or never.",
        ),
    ] = RefillName.OFF
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Special tokens that messages and documents spell out act as such: only for text"
            " that you trust.",
        ),
    ] = False
    mmproj: Mmproj = None
    image_tokens: ImageTokens = None


@dataclass(frozen=True)
class SamplingOptions(Group):
    """How answers are sampled."""

    panel: ClassVar[str] = "Answers"

    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="Longest answer. Default: what the context holds."
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0.0, callback=finite, help="0 always takes the likeliest token."
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0.0, max=1.0, callback=finite, help="Nucleus sampling."),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=MOST_SEED, help="Makes an answer repeatable. Default: chance."
        ),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given; the engine has its own defaults for the others."""
        return given(**vars(self))


@dataclass(frozen=True)
class FittingOptions(Group):
    """How projections are fitted, but for the text."""

    panel: ClassVar[str] = "The fit"

    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="Tokens to fit on. Default: 24 per dimension, 16384 at least."
        ),
    ] = None
    kv_type: Annotated[
        KvType | None,
        typer.Option("--kv-type", help="Type of the fitted weights. Default: q8_0."),
    ] = None
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GB",
            min=0.0,
            max=1e9,
            callback=finite,
            help="For the fit's sums. Default: half of what is free.",
        ),
    ] = None

    def fit(self, **others: Any) -> FitOptions | None:
        """Return the options of the fit that were given, with others; None where none was."""
        memory_bytes = None if self.memory is None else int(self.memory * 10**9)
        found = given(tokens=self.tokens, kv_type=self.kv_type, memory_bytes=memory_bytes, **others)
        return FitOptions(**found) if found else None


BoundaryLayer = Annotated[
    int | None, typer.Option(metavar="LAYER", help="The first layer to skip, instead of --skip.")
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


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


def share(text: str, option: str) -> "Skip":
    """A share of the layers; what cannot be one is wrong usage of the option."""
    try:
        parse_skip(text)
    except PlanError as error:
        raise _usage(error, option) from error
    from pop_local.workflows.conversion.goals import Skip

    return Skip(text)


def named_boundary(skip: str | None, boundary: int | None) -> "Named | None":
    """Return the boundary of --skip or --boundary; None where neither was given."""
    from pop_local.workflows.conversion.goals import Boundary

    if skip is not None and boundary is not None:
        raise typer.BadParameter("give one of --skip and --boundary", param_hint="--boundary")
    if skip is not None:
        return share(skip, "--skip")
    return None if boundary is None else Boundary(boundary)


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


def no_fit(given: FitOptions | None, of: str) -> None:
    """Wrong usage if options of the fit were given: `of` says why they belong to nothing."""
    if given is not None:
        raise typer.BadParameter(f"options of the fit were given, but {of}")
