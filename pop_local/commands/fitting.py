"""Fitted projections on the command line: the options, what they take, and the fit itself."""

import glob
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converter.errors import StoppedError
from converter.fit import RIDGE, KvType, Weighting
from converter.format import FITTED, OWN
from converter.plan import Plan
from converter.rewrite import Fitted
from converter.source import Source
from pop_local.commands.options import finite
from pop_local.ui.interrupt import deferred_interrupt
from pop_local.ui.progress import token_stages
from pop_local.ui.tables import Fact, size

if TYPE_CHECKING:
    from pop_local.calibration.needs import Needs

# Where the machine does not say what is free.
_FALLBACK_BYTES = 4 * 10**9


class ProjectionName(str, Enum):
    FITTED = FITTED
    OWN = OWN


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


@dataclass(frozen=True)
class FitOptions:
    """As given on the command line, None where nothing was. `state_path`: to resume from."""

    tokens: int | None = None
    text: Path | None = None
    kv_type: KvType | None = None
    ridge: float | None = None
    weighting: Weighting | None = None
    memory_gb: float | None = None
    state_path: Path | None = None

    @property
    def stored_type(self) -> KvType:
        return self.kv_type or KvType.Q8_0

    @property
    def memory_bytes(self) -> int:
        return free_bytes() // 2 if self.memory_gb is None else int(self.memory_gb * 10**9)

    def require_none(self, of: str) -> None:
        """Wrong usage if any was given: `of` says what they would belong to."""
        if self != FitOptions():
            raise typer.BadParameter(f"options of the fit were given, but {of}")

    def require_text(self, n_embd: int) -> None:
        """Refuses what a fit would refuse, before anything is measured. Raises PopError."""
        from pop_local.calibration.texts import require_text

        self.n_tokens(n_embd)
        if self.text is not None:
            require_text(self.text, n_embd)

    def kept(self) -> list[Path]:
        """The files to resume from, of whatever boundaries (`at`)."""
        if self.state_path is None:
            return []
        name = glob.escape(self.state_path.name)
        folder = self.state_path.parent
        return sorted([*folder.glob(name), *folder.glob(f"{name}-[0-9]*")])

    def at(self, boundary: int) -> "FitOptions":
        """With a file of its own to resume from, for one of several fits."""
        if self.state_path is None:
            return self
        path = self.state_path
        return replace(self, state_path=path.with_name(f"{path.name}-{boundary}"))

    def n_tokens(self, n_embd: int) -> int:
        """To fit on, in whole windows. Raises CalibrationError for too few."""
        from pop_local.calibration.texts import N_WINDOW, default_tokens, n_windows

        if self.tokens is None:
            return default_tokens(n_embd)
        return n_windows(self.tokens, n_embd) * N_WINDOW


def free_bytes() -> int:
    """Memory that programs could take now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return _FALLBACK_BYTES


def fit_needs(plans: Sequence[Plan], source: Source, options: FitOptions) -> "Needs":
    """Raises CalibrationError for too few tokens."""
    from pop_local.calibration.needs import plan_needs
    from pop_local.calibration.texts import N_WINDOW, n_sampled_of

    n_windows = options.n_tokens(plans[0].shape.n_embd) // N_WINDOW
    n_sampled = n_sampled_of(n_windows) if options.text is None else 0
    return plan_needs(plans, source, options.memory_bytes, n_sampled)


def fit_facts(plans: Sequence[Plan], source: Source, options: FitOptions) -> list[Fact]:
    from pop_local.calibration.texts import DEFAULT_NAME

    needs = fit_needs(plans, source, options)
    n_passes = len(needs.groups)
    passes = "one pass" if n_passes == 1 else f"{n_passes} passes, {n_passes} times the work"
    n_tokens = options.n_tokens(plans[0].shape.n_embd)
    return [
        ("Fitted on", f"{options.text or DEFAULT_NAME}: {n_tokens:,} tokens in {passes}"),
        ("Memory", f"{size(needs.total_bytes)} in all, {size(needs.sums_bytes)} for the fit"),
    ]


def fit(
    plans: Sequence[Plan],
    source: Source,
    options: FitOptions,
    *,
    n_threads: int | None,
    n_gpu_layers: int,
) -> tuple[Fitted, ...]:
    """For each plan; raises PopError, and KeyboardInterrupt when stopped.

    With `state_path` what was read or fitted is kept there.
    """
    if not plans:
        return ()
    from pop_local.calibration.job import Settings, Watch, calibrate
    from pop_local.calibration.loaded import LoadedModel

    defaults = Settings(n_tokens=options.n_tokens(plans[0].shape.n_embd))
    settings = Settings(
        n_tokens=defaults.n_tokens,
        text=options.text,
        ridge=defaults.ridge if options.ridge is None else options.ridge,
        weighting=options.weighting or defaults.weighting,
        kv_type=options.stored_type,
        memory_bytes=options.memory_bytes,
        state_path=options.state_path,
    )
    opened = LoadedModel(source.first.path, n_gpu_layers=n_gpu_layers, n_threads=n_threads)
    with (
        opened as model,
        deferred_interrupt() as interrupt,
        token_stages("Sampling text", "Fitting") as (on_sampling, on_reading),
    ):
        watch = Watch(on_sampling, on_reading, lambda: interrupt.asked)
        with suppress(StoppedError):
            fitted = calibrate(plans, model, source, settings, watch)
            if not interrupt.asked:
                return fitted
    raise KeyboardInterrupt
