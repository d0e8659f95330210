"""Options that several commands share, in groups that a command takes as one object."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from pop_converter.base.errors import PlanError, PopError
from pop_converter.fit.least_squares import KvType
from pop_converter.popfile.pruning_plan import parse_skip
from pop_local.calibration.fit_options import FitOptions
from pop_local.commands.option_expansion import Group, option
from pop_local.config.settings import MOST, MOST_SEED, load
from pop_local.engine.llama.rpc import address
from pop_local.ui.theme import warn
from pop_local.workflows.hardware import Hardware

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


def one_output(argument: Path | None, option: Path | None) -> Path | None:
    """Return the output that was given in one of both places."""
    if argument and option:
        raise typer.BadParameter("OUT.gguf is given as an argument, too", param_hint="--output")
    return argument or option


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


_THREADS = "CPU threads. Default: the physical cores."
_CORES: dict[str, Any] = {"min": 1, "callback": _no_more_than_cores}
_SIDECAR = (
    "The model's sidecar. Default: NAME.pop-sidecar.gguf beside it, or one that comes with"
    " pop-local."
)
FIT_TEXTS = (
    "Text to fit on, read in equal shares; repeatable. Default: documentation, code and samples of"
    " the model."
)
MMPROJ = "What lets the model see pictures. Default: the mmproj*.gguf beside it, if there is one."
DEEP_ROWS = "Words whose tokens run all layers (default: as the file says)."
Converted = Annotated[
    str, typer.Argument(metavar="MODEL", help="A converted GGUF file, or one with a sidecar.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT.gguf", help="The same as OUT.gguf after IN.gguf."),
]
Sidecar = Annotated[Path | None, typer.Option("--sidecar", metavar="PATH", help=_SIDECAR)]
System = Annotated[str, typer.Option("--system", help="System prompt.")]
Theme = Annotated[
    str,
    typer.Option(
        help="Of answers in a terminal: terminal (its own colours), dark, light, plain,"
        " or a style of Pygments.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help=_THREADS, **_CORES)]


@dataclass(frozen=True)
class ProcessorOptions(Group):
    panel: ClassVar[str] = "Hardware"

    threads: int | None = option(_THREADS, **_CORES)
    gpu_layers: int = option(
        "Layers on the GPU; -1 for all, 0 for none.", min=-1, max=MOST, default=-1
    )

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.threads, self.gpu_layers)


@dataclass(frozen=True)
class HardwareOptions(ProcessorOptions):
    rpc: str | None = option(
        "Machines that hold the layers, each with `pop-local rpc-server` running.",
        "HOST:PORT,...",
    )

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

    sidecar: Path | None = option(_SIDECAR, "PATH")
    # It must not be called ctx: the setting of that name is for conversations.
    n_ctx: int | None = option(
        "Context in tokens. Default: what is measured needs.", flag="--ctx", min=1, max=MOST
    )


@dataclass(frozen=True)
class PictureOptions(Group):
    panel: ClassVar[str] = "Pictures"

    mmproj: Path | None = option(MMPROJ, "FILE")
    image_tokens: int | None = option(
        "The most that one picture takes, with models where that varies.",
        "MAX",
        min=1,
        max=MOST,
    )


@dataclass(frozen=True)
class OpenOptions(HardwareOptions):
    """The model that is talked to, but for its name."""

    panel: ClassVar[str] = "Model and hardware"

    sidecar: Path | None = option(_SIDECAR, "PATH")
    ctx: int | None = option(
        "Context in tokens. Default: the model's, at most 8192.", min=1, max=MOST
    )


@dataclass(frozen=True)
class ModelOptions(OpenOptions, PictureOptions):
    """The same, and how it reads."""

    panel: ClassVar[str] = "Model and hardware"

    full: bool = option("Read prompts in full, without pruning.", default=False)
    refill: Literal["idle", "off"] = option(
        "Run pruned tokens through the skipped layers while the model is idle.", default="off"
    )
    learn: Literal["on", "off"] = option(
        "Learn from what is read, to read it faster later; sums are kept, no text.",
        default="off",
    )
    parse_special: bool = option(
        "Special tokens that messages and documents spell out act as such: only for text that you"
        " trust.",
        default=False,
    )


@dataclass(frozen=True)
class SamplingOptions(Group):
    panel: ClassVar[str] = "Answers"

    max_tokens: int | None = option("Longest answer. Default: what the context holds.", min=1)
    temperature: float | None = option(
        "0 always takes the likeliest token.", min=0.0, callback=finite
    )
    top_k: int | None = option("Choose among so many likeliest tokens; 0: all.", min=0, max=MOST)
    top_p: float | None = option("Nucleus sampling.", min=0.0, max=1.0, callback=finite)
    seed: int | None = option("Makes an answer repeatable. Default: chance.", min=0, max=MOST_SEED)

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given; the engine has its own defaults for the others."""
        return given(**vars(self))


@dataclass(frozen=True)
class FittingOptions(Group):
    """How projections are fitted, but for the text."""

    panel: ClassVar[str] = "The fit"

    tokens: int | None = option(
        "Tokens to fit on. Default: 24 per dimension, 16384 at least.", min=1
    )
    kv_type: KvType | None = option("Type of the fitted weights. Default: q8_0.")
    memory: float | None = option(
        "For the fit's sums. Default: half of what is free.",
        "GB",
        min=0.0,
        max=1e9,
        callback=finite,
    )

    def fit(self, **others: Any) -> FitOptions | None:
        """Return the options of the fit that were given, with others; None where none was."""
        memory_bytes = None if self.memory is None else int(self.memory * 10**9)
        found = given(tokens=self.tokens, kv_type=self.kv_type, memory_bytes=memory_bytes, **others)
        return FitOptions(**found) if found else None


@dataclass(frozen=True)
class BoundaryOptions(Group):
    skip: str | None = option("Layers to skip: 1/3, 0.33, or a number.", "SHARE")
    boundary: int | None = option("The first layer to skip, instead of --skip.", "LAYER")

    @property
    def named(self) -> "Named | None":
        """The boundary of --skip or --boundary; None where neither was given."""
        from pop_local.workflows.conversion.goals import Boundary

        if self.skip is not None and self.boundary is not None:
            raise typer.BadParameter("give one of --skip and --boundary", param_hint="--boundary")
        if self.skip is not None:
            return share(self.skip, "--skip")
        return None if self.boundary is None else Boundary(self.boundary)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def share(text: str, option: str) -> "Skip":
    """A share of the layers; what cannot be one is wrong usage of the option."""
    try:
        parse_skip(text)
    except PlanError as error:
        raise _usage(error, option) from error
    from pop_local.workflows.conversion.goals import Skip

    return Skip(text)


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
