"""Measure the loss and the speedup at each of a model's boundaries.

Repeated random tokens show at which boundaries the model can still copy with the layers' own
projections. Fitting rarely changes a model's ability to copy. Only the second half of the layers
is tested. If the model can still copy text when it is pruned at a boundary, the analysis measures
the KL and the copy ratio on a few windows of prose, with fitted projections if possible.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pop_base.errors import PopError
from pop_base.progress import Progress, Watch, counting
from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import default_tokens
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.measure import budget
from pop_local.measure.budget import boundaries, is_inside, may_copy
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import Text, shipped_part, tokenize
from pop_local.measure.probes import N_REPEATED, measure_induction
from pop_local.measure.quality import (
    Quality,
    QualityReference,
    QualitySettings,
    measure_against,
    read_reference,
    retention,
)
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import opened, row_options
from pop_local.workflows.open import base_file

# Boundaries with a smaller speedup limit are not measured.
LEAST_LIMIT = 1.05
# Context and answer tokens of each prose window.
N_CONTEXT, N_ANSWER = 192, 64
_N_CTX = max(N_CONTEXT + N_ANSWER, 2 * N_REPEATED + 1)
# Number of prose windows, enough to compare boundaries. `convert` measures more.
_N_PROBED = 3
# Number of random sequences. With two sequences, the retention has an error of a few percent.
_N_DRAWS = 2
# To compare boundaries, a quarter of the tokens that `convert` reads is enough.
_FIT_SHARE = 4


@dataclass(frozen=True)
class DepthCost:
    """The loss and the speedup at one boundary.

    `retention`: `Quality.induction_retention` with the layers' own projections (None if the full
    model shows no gain). `quality` and `projection` are None if not measured.
    """

    boundary: int
    n_skipped: int
    speedup_limit: float
    retention: Estimate | None
    quality: Quality | None = None
    projection: Projection | None = None


@dataclass(frozen=True)
class Analysis:
    """The results of `analyze`.

    `calibration` is None if no boundary needed a fit. `depths`: the boundaries in descending
    order. `chosen`: the deepest boundary whose measured loss is within `budget` (None if every
    loss exceeds `budget`).
    """

    model: Path
    depths: tuple[DepthCost, ...]
    calibration: Calibration | None
    budget: Budget
    chosen: DepthCost | None


def analyze(
    model: str | os.PathLike[str], *, hardware: Hardware = Hardware(), watch: Watch = Watch()
) -> Analysis:
    """Measure each boundary's loss and speedup.

    `model`: the path or name of an unconverted model. Raises PopError or StoppedError.
    """
    source = read_source(base_file(os.fspath(model), watch))
    if pop_of(source, None) is not None:
        raise PopError(f"{source.first.path} is already converted", "use the original model")
    run = _Run(source, hardware, watch)
    depths, reference = run.probed()
    fitted_depths, calibration = run.measured(reference, worth_measuring(depths))
    measured = {depth.boundary: depth for depth in fitted_depths}
    depths = tuple(measured.get(depth.boundary, depth) for depth in depths)
    return Analysis(
        model=source.first.path,
        depths=depths,
        calibration=calibration,
        budget=budget.BALANCED,
        chosen=deepest_within(budget.BALANCED, depths),
    )


@dataclass(frozen=True)
class _Run:
    source: Source
    hardware: Hardware
    watch: Watch

    @cached_property
    def plans(self) -> dict[int, Plan]:
        """The plan for each boundary, with the same full rows as in a conversion."""
        shape, macs = source_shape(self.source), GraphMacs(self.source.first.path)
        return {
            boundary: make_plan(shape, boundary=boundary, projection=Projection.FITTED, macs=macs)
            for boundary in boundaries(shape)
        }

    @property
    def last(self) -> Plan:
        """The plan that skips only the last layer."""
        return self.plans[max(self.plans)]

    @cached_property
    def _fit_options(self) -> FitOptions:
        n_tokens = default_tokens(self.last.shape.n_embd) // _FIT_SHARE
        return FitOptions(n_tokens, projection=Projection.FITTED)

    def probed(self) -> tuple[tuple[DepthCost, ...], QualityReference]:
        """Return each boundary's retention and the full model's scores. Raises PopError."""
        settings = QualitySettings(_N_PROBED, N_CONTEXT, N_ANSWER, n_draws=_N_DRAWS)
        files, rows = ModelFiles(self.source.first.path), row_options(self.last)
        with opened(files, self.hardware, self.watch, n_ctx=_N_CTX, **rows) as model:
            tokens = tokenize(model, Text("prose", (shipped_part("prose"),)))
            advance = self.watch.stage("Running the full model")
            reference = read_reference(model, tokens, settings, advance)
            advance = self.watch.stage("Measuring how well the model copies at each boundary")
            depths = measure_copying(model, reference, advance)
        return depths, reference

    def measured(
        self, reference: QualityReference, tried: Sequence[DepthCost]
    ) -> tuple[list[DepthCost], Calibration | None]:
        """Fit projections at each boundary in `tried`, and measure each fit's quality on prose."""
        runner = TrialRunner(self.source, self.hardware, self.watch)
        plans = [self.plans[depth.boundary] for depth in tried]
        runner.require_room(plans, self._fit_options.kv_type)
        to_fit = [plan for plan in plans if plan.fitted_layers]
        fitted = PlanFitter(runner, self._fit_options).fit(to_fit)
        fits = dict(zip(to_fit, fitted, strict=True))
        depths = []
        for depth, plan in zip(tried, plans, strict=True):
            with runner.tried(plan, fits.get(plan), n_ctx=_N_CTX) as model:
                advance = self.watch.stage(f"Measuring boundary {plan.boundary}")
                quality = measure_against(reference, model, Pruning(plan.boundary), advance)
            depths.append(replace(depth, quality=quality, projection=plan.projection))
        return depths, fitted[0].calibration if fitted else None


def measure_copying(
    model: PopModel, reference: QualityReference, on_progress: Progress
) -> tuple[DepthCost, ...]:
    """Measure the retention at each boundary.

    The speedup limits apply to prompts of LIMIT_PROMPT tokens. Progress is reported in draws.
    """
    context, rule = model.engine.context, model.engine.sequences[0].rule
    tried, retentions = boundaries(context.files.shape), []
    with forced(model) as reader:
        ran = counting(len(tried) * reference.settings.n_draws, on_progress)
        for boundary in tried:
            nll = measure_induction(reader, reference.repeated, Pruning(boundary), ran)
            retentions.append(retention(reference.repeated, nll))
    n_full = rule.sink_tokens + rule.tail_tokens
    return tuple(
        DepthCost(
            boundary=boundary,
            n_skipped=context.files.shape.n_layer - boundary,
            speedup_limit=speedup_limit(context.files.macs, LIMIT_PROMPT, boundary, n_full),
            retention=retained,
        )
        for boundary, retained in zip(tried, retentions, strict=True)
    )


def worth_measuring(depths: Sequence[DepthCost]) -> list[DepthCost]:
    """Return the boundaries at which copying may still work, and the next lower boundary.

    Boundaries with a speedup limit below LEAST_LIMIT are omitted.
    """
    hopeful = [may_copy(depth.retention) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    return [depth for depth in depths[:n_worth] if depth.speedup_limit >= LEAST_LIMIT]


def deepest_within(budget: Budget, depths: Sequence[DepthCost]) -> DepthCost | None:
    """Return the deepest boundary within the budget, or None if all exceed the budget."""
    inside = [d for d in depths if d.quality is not None and is_inside(budget, d.quality)]
    return min(inside, key=lambda depth: depth.boundary, default=None)
