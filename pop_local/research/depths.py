"""Brief measurements of each boundary in the deeper half of a model.

Repeated random tokens show how well the model still copies at each boundary with the layers' own
projections. Fits hardly change this result. At boundaries where the model still copies, a few
windows of prose are measured for the KL and the copy ratio, with fitted projections if possible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.base.progress import Progress, counting
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.projection import Projection
from pop_local.engine.model import PopModel
from pop_local.measure.budget import boundaries, is_inside, may_copy
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.probes import measure_induction
from pop_local.measure.quality import Quality, QualityReference, retention

# Skipping a layer at the cliff loses at least this share of the full model's gain.
CLIFF = 0.2
# Boundaries with a smaller speed-up limit are not measured.
LEAST_LIMIT = 1.05


@dataclass(frozen=True)
class DepthCost:
    """The loss and the speed-up at one boundary.

    `retention`: the `induction_retention` of `Quality` with the layers' own projections.
    `lost_retention`: the share of the full model's gain that is additionally lost by skipping the
    boundary layer. Both are None if the full model has no gain. `quality` (on prose) and
    `projection` are None if the boundary was not measured on prose. `calibration` is None without a
    fit.
    """

    boundary: int
    n_skipped: int
    speedup_limit: float
    retention: Estimate | None
    lost_retention: float | None
    quality: Quality | None = None
    projection: Projection | None = None
    calibration: Calibration | None = None

    @property
    def is_cliff(self) -> bool:
        return self.lost_retention is not None and self.lost_retention >= CLIFF


def measure_cliff(
    model: PopModel, reference: QualityReference, on_progress: Progress
) -> tuple[DepthCost, ...]:
    """Measure the retention at each boundary, and the retention that skipping each layer loses.

    The speed-up limits apply to prompts of LIMIT_PROMPT tokens. `on_progress` counts draws.
    """
    context, rule = model.engine.context, model.engine.rule
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
            lost_retention=lost,
        )
        for boundary, retained, lost in zip(tried, retentions, losses(retentions), strict=True)
    )


def losses(retentions: Sequence[Estimate | None]) -> list[float | None]:
    """Return the additional loss of retention at each boundary, in order of increasing depth.

    Negative retentions count as 0. All losses are None if the full model cannot copy.
    """
    kept = [max(0.0, each.value) for each in retentions if each is not None]
    if len(kept) < len(retentions):
        return [None] * len(retentions)
    return [before - now for before, now in pairwise((1.0, *kept))]


def worth_measuring(depths: Sequence[DepthCost]) -> list[DepthCost]:
    """Return the boundaries that may retain enough copying, and the next deeper boundary.

    Boundaries with a speed-up limit below LEAST_LIMIT are omitted.
    """
    hopeful = [may_copy(depth.retention) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    return [depth for depth in depths[:n_worth] if depth.speedup_limit >= LEAST_LIMIT]


def deepest_within(budget: Budget, depths: Sequence[DepthCost]) -> DepthCost | None:
    """Return the deepest boundary within a budget, or None if all boundaries exceed the budget."""
    inside = [d for d in depths if d.quality is not None and is_inside(budget, d.quality)]
    return min(inside, key=lambda depth: depth.boundary, default=None)
