"""What `eval` runs: models opened at each depth, measured, and turned into rows."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError
from converter.format import FITTED, OWN
from converter.header import read_header
from converter.macs import LIMIT_PROMPT, speedup_limit
from converter.plan import make_plan
from converter.rewrite import stored_type
from converter.shape import ModelShape, trained_ctx
from converter.sidecar import pop_of
from converter.source import Source
from pop_local.commands.converting import fitted_sidecars
from pop_local.commands.fitting import FitOptions
from pop_local.ui.progress import token_progress
from pop_local.ui.views.quality import ALWAYS_SKIP, Row

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.heldout import Text
    from pop_local.measure.needle import Needle
    from pop_local.measure.quality import QualitySettings


class Baseline(str, Enum):
    ALWAYS_SKIP = ALWAYS_SKIP


@dataclass(frozen=True)
class Run:
    """What is measured, and with what; `n_needles` 0 for none."""

    text: "Text"
    settings: "QualitySettings"
    n_needles: int
    sink: int | None
    tail: int | None
    ctx: int | None
    threads: int | None
    gpu_layers: int
    baseline: Baseline | None = None
    sidecar: Path | None = None


def fitted_rows(
    source: Source,
    shape: ModelShape,
    boundaries: Sequence[int],
    options: FitOptions,
    run: Run,
) -> tuple[Row, ...]:
    """Fit at all depths in one go, then measure a temporary sidecar of each."""
    _context(source, run)  # what does not fit is said before minutes of fitting
    plans = [make_plan(shape, boundary=depth, projection=FITTED) for depth in boundaries]
    sidecars = fitted_sidecars(
        plans, source, options, n_threads=run.threads, n_gpu_layers=run.gpu_layers
    )
    with closing(sidecars):
        return tuple(
            row
            for depth, sidecar in zip(boundaries, sidecars, strict=True)
            for row in rows_at(source, shape, (depth,), replace(run, sidecar=sidecar))
        )


def rows_at(
    source: Source, shape: ModelShape, boundaries: Sequence[int], run: Run
) -> tuple[Row, ...]:
    """Measure the depths on one loaded model."""
    from pop_local.measure.forced import Pruning, always_skip
    from pop_local.measure.heldout import tokenize
    from pop_local.measure.quality import measure_prunings

    prunings = [Pruning(boundary, run.settings.mode) for boundary in boundaries]
    if run.baseline is not None:
        prunings += [always_skip(boundary) for boundary in boundaries]
    opened = _opened(source, run)
    try:
        tokens = tokenize(opened, run.text)
        with token_progress("Measuring") as advance:
            qualities = measure_prunings(opened, tokens, run.settings, prunings, advance)
        needles = _needles(opened, boundaries, run)
        n_full = opened.rule.sink_tokens + opened.rule.tail_tokens
    finally:
        opened.close()
    meta = pop_of(source, run.sidecar)
    n = len(boundaries)
    baselines = qualities[n:] or (None,) * n
    calibration = None if meta is None else meta.calibration
    tensors = source.tensors if run.sidecar is None else read_header(run.sidecar).tensors
    return tuple(
        Row(
            n_skipped=shape.n_layer - quality.boundary,
            projection=FITTED if calibration is not None else OWN,
            calibration=calibration,
            kv_type=stored_type(tensors),
            speedup_limit=speedup_limit(shape, LIMIT_PROMPT, quality.boundary, n_full),
            quality=quality,
            needle=needle,
            always_skip=baseline,
        )
        for quality, needle, baseline in zip(qualities[:n], needles, baselines, strict=True)
    )


def _opened(source: Source, run: Run) -> "PopModel":
    from pop_local.engine.model import PopModel
    from pop_local.measure.forced import use_rule

    opened = PopModel(
        source.first.path,
        sidecar=run.sidecar,
        n_ctx=_context(source, run),
        n_threads=run.threads,
        n_gpu_layers=run.gpu_layers,
    )
    rule = opened.rule
    sink = rule.sink_tokens if run.sink is None else run.sink
    tail = rule.tail_tokens if run.tail is None else run.tail
    use_rule(opened, replace(rule, sink_tokens=sink, tail_tokens=tail))
    return opened


def _context(source: Source, run: Run) -> int:
    from pop_local.measure.needle import context_tokens
    from pop_local.measure.probes import N_REPEATED

    windows = run.settings.n_context + run.settings.n_continuation
    needed = max(windows, 2 * N_REPEATED + 1, context_tokens() if run.n_needles else 0)
    trained = trained_ctx(source.first)
    limit, whose = (trained, "the model has") if run.ctx is None else (run.ctx, "--ctx gives")
    if limit is not None and limit < needed:
        raise PopError(
            f"{needed} tokens of context are needed, {whose} {limit}",
            "give shorter windows (--context, --continuation), perhaps without --needles",
        )
    return run.ctx or needed


def _needles(opened: "PopModel", boundaries: Sequence[int], run: Run) -> "Sequence[Needle | None]":
    if run.n_needles == 0:
        return (None,) * len(boundaries)
    from pop_local.measure.needle import measure_needle

    with token_progress("Asking") as advance:
        return measure_needle(opened, boundaries, run.n_needles, run.settings.seed, advance)
