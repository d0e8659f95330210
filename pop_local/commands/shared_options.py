"""Options and option groups that multiple commands share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from pop_local.commands.option_expansion import Group, expert, option
from pop_local.config.limits import MOST, MOST_GIB, MOST_THREADS
from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.prefill.plan import Reuse
from pop_local.workflows.hardware import Hardware


def finite(value: float | None) -> float | None:
    """Reject nan and inf, which pass Typer's range checks. All float options use this callback."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def positive(value: float | None) -> float | None:
    """Reject values that are not finite and positive."""
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} is not greater than 0")
    return finite(value)


_SIDECAR = (
    "Sidecar file (default: the file next to the model; otherwise, a sidecar that was fitted to"
    " your prompts or shipped with pop-local)."
)
MMPROJ = "Multimodal projector for images (default: mmproj*.gguf in the model's folder)."
DEEP_ROWS = "Rule that selects words to run through all layers (default: the file's rule)."
_MODEL = "A GGUF file, a name listed by `pop-local pull`, or hf:OWNER/REPO"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL}.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help=f"{_MODEL} (default: the best catalog model that fits in memory)."
    ),
]
Converted = Annotated[
    str, typer.Argument(metavar="MODEL", help="A converted GGUF file, or a model with a sidecar.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Sidecar = Annotated[Path | None, typer.Option("--sidecar", metavar="PATH", help=_SIDECAR)]
System = Annotated[str, typer.Option("--system", metavar="TEXT", help="System prompt.")]


@dataclass(frozen=True)
class HardwareOptions(Group):
    panel: ClassVar[str] = "Hardware"

    threads: int | None = option(
        "Number of CPU threads (default: one per physical core).", min=1, max=MOST_THREADS
    )
    gpu_layers: int = option(
        "Number of layers to run on the GPU (-1: all).", min=-1, max=MOST, default=-1
    )

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.threads, self.gpu_layers)


@dataclass(frozen=True)
class MeasureOptions(HardwareOptions):
    """Options for opening a model for a measurement."""

    panel: ClassVar[str] = "Model and hardware"

    sidecar: Path | None = option(_SIDECAR, "PATH")
    # The field is not named ctx, because the setting `ctx` is for conversations.
    n_ctx: int | None = option(
        "Context length in tokens (default: the required length).", flag="--ctx", min=1, max=MOST
    )


@dataclass(frozen=True)
class OpenOptions(HardwareOptions):
    """Options for opening a model."""

    panel: ClassVar[str] = "Model and hardware"

    sidecar: Path | None = expert(_SIDECAR, "PATH")
    ctx: int | None = option(
        "Context length in tokens (default: the model's training context length, or less if that"
        " length would need more than a quarter of the free memory).",
        min=1,
        max=MOST,
    )


@dataclass(frozen=True)
class ModelOptions(OpenOptions):
    """Options for opening a model and reading prompts."""

    mmproj: Path | None = option(MMPROJ, "FILE")
    image_tokens: int | None = expert(
        "Maximum number of tokens per image (not supported by every mmproj).", min=1, max=MOST
    )
    full: bool = option("Turn fast reading off.", default=False)
    refill: Literal["idle", "off"] = expert(
        "Run the skipped layers for cached tokens while the model is idle.", default="off"
    )
    reuse: Reuse = expert(
        "Which cached tokens a prompt may reuse (default: edited). off: reuse nothing. exact: reuse"
        " a common prefix. edited: also reuse the tokens after an edit, although their cached"
        " values are then approximate.",
        default=Reuse.EDITED,
    )
    cache_type_k: Literal["f16", "q8_0"] = expert(
        "Type of the K cache (default: f16). q8_0 uses 47% less memory than f16.", default="f16"
    )
    cache_type_v: Literal["f16", "q8_0"] = expert(
        "Type of the V cache (default: f16). With q8_0, flash attention is on.", default="f16"
    )
    cache_disk: int = expert(
        "Disk space for KV caches of earlier prompts.", "GIB", min=0, max=MOST_GIB, default=0
    )
    parse_special: bool = expert("Parse special tokens (for trusted text only).", default=False)

    @property
    def cache_types(self) -> dict[str, Any]:
        """Return ContextOptions keyword arguments for the KV cache types."""
        from gguf import GGMLQuantizationType

        types = {"type_k": self.cache_type_k, "type_v": self.cache_type_v}
        others = {name: GGMLQuantizationType.Q8_0 for name in types if types[name] == "q8_0"}
        # llama.cpp requires flash attention for a quantized V cache.
        return {"others": others, "flash_attn": True if "type_v" in others else None}


def _add_sampler_options(group: type[Group]) -> type[Group]:
    """Add one field for each sampling option to a group."""
    for name, entry in SAMPLER_OPTIONS.items():
        add = expert if entry.is_expert else option
        check = finite if entry.kind is float else None
        setattr(group, name, add(entry.help, min=entry.least, max=entry.most, callback=check))
        group.__annotations__[name] = entry.kind | None
    return group


@dataclass(frozen=True)
@_add_sampler_options
class SamplingOptions(Group):
    panel: ClassVar[str] = "Answers"

    max_tokens: int | None = option("Maximum answer length in tokens (default: no limit).", min=1)

    @property
    def given(self) -> dict[str, Any]:
        """Return the options that the user set. The engine supplies the other values."""
        return given(**vars(self))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
