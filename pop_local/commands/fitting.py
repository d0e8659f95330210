"""The fit that `convert` runs before it writes."""

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pop_converter.fit import KvType, Weighting
from pop_converter.format import FITTED, OWN
from pop_converter.plan import Plan
from pop_converter.rewrite import Fitted
from pop_converter.source import Source

from pop_local.ui.interrupt import deferred_interrupt
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import Fact, size
from pop_local.ui.theme import note

STATE_SUFFIX = ".calibration"
# Where the machine does not say what is free.
_FALLBACK_BYTES = 4 * 10**9


class ProjectionName(str, Enum):
    FITTED = FITTED
    OWN = OWN


KvTypeName = KvType
WeightingName = Weighting


@dataclass(frozen=True)
class FitOptions:
    """As given on the command line; `memory_gb` None for half of what is free."""

    n_tokens: int
    text: Path | None
    kv_type: str
    ridge: float
    weighting: str
    memory_gb: float | None
    resume: bool
    n_threads: int | None
    n_gpu_layers: int

    @property
    def memory_bytes(self) -> int:
        return free_bytes() // 2 if self.memory_gb is None else int(self.memory_gb * 10**9)


def n_tokens(plan: Plan, given: int | None) -> int:
    """The tokens to fit on, in whole windows. Raises CalibrationError for too few."""
    from pop_local.calibration.texts import N_WINDOW, default_tokens, n_windows

    n_embd = plan.shape.n_embd
    if given is None:
        return default_tokens(n_embd)
    if plan.projection != FITTED:
        return given
    return n_windows(given, n_embd) * N_WINDOW


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


def fit_facts(plan: Plan, source: Source, options: FitOptions) -> list[Fact]:
    from pop_local.calibration.job import plan_needs
    from pop_local.calibration.texts import DEFAULT_NAME

    needs = plan_needs(plan, source, options.memory_bytes)
    n_passes = len(needs.groups)
    passes = "one pass" if n_passes == 1 else f"{n_passes} passes, {n_passes} times the work"
    return [
        ("Fitted on", f"{options.text or DEFAULT_NAME}: {options.n_tokens:,} tokens in {passes}"),
        ("Memory", f"{size(needs.total_bytes)} in all, {size(needs.sums_bytes)} for the fit"),
    ]


def fit(plan: Plan, source: Source, target: Path, options: FitOptions) -> Fitted:
    """Raises PopError; KeyboardInterrupt when stopped, with the state kept if --resume says so."""
    from pop_local.calibration.job import CalibrationStoppedError, Settings, Watch, calibrate
    from pop_local.engine.loaded import LoadedModel

    state = target.with_name(f".{target.name}{STATE_SUFFIX}")
    settings = Settings(
        n_tokens=options.n_tokens,
        text=options.text,
        ridge=options.ridge,
        weighting=Weighting(options.weighting),
        kv_type=KvType(options.kv_type),
        memory_bytes=options.memory_bytes,
        state_path=state if options.resume else None,
    )
    opened = LoadedModel(
        source.first.path, n_gpu_layers=options.n_gpu_layers, n_threads=options.n_threads
    )
    with opened as model, deferred_interrupt() as interrupt, token_progress("Fitting") as advance:
        watch = Watch(advance, advance, lambda: interrupt.asked)
        with suppress(CalibrationStoppedError):
            return calibrate(plan, model, source, settings, watch)
    if options.resume and state.exists():
        note(f"What was read is kept in {state}: the same command goes on from there.")
    raise KeyboardInterrupt
