"""Brief measurements of the boundaries in the deeper half of a model.

Repeated random tokens show how much copying each boundary retains with the layers' own projections;
fits hardly change the result. For boundaries that retain copying, a few windows of prose give KL
and copy ratio, with fitted projections if possible.
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

# A layer is the cliff if skipping it loses this share of the full model's gain.
CLIFF = 0.2
# Minimum speed-up limit of a boundary that is worth measuring.
LEAST_LIMIT = 1.05


@dataclass(frozen=True)
class DepthCost:
    """The cost of one boundary.

    `retention`: see `Quality`, with the layers' own projections. `lost_retention`: the share of the
    full model's gain that is lost by also skipping the boundary layer. Both are None if the full
    model has no gain. `quality` (on prose) and `projection` are None if not measured. `calibration`
    is None without a fit.
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
    """Measure the retention at each of `boundaries`, and each layer's loss of it.

    The speed-up limits are for prompts of LIMIT_PROMPT tokens. `on_progress` counts draws.
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
    """Return the additional loss at each boundary, from the shallowest to the deepest.

    Negative retentions count as 0. All losses are None if the full model does not copy.
    """
    kept = [max(0.0, each.value) for each in retentions if each is not None]
    if len(kept) < len(retentions):
        return [None] * len(retentions)
    return [before - now for before, now in pairwise((1.0, *kept))]


def worth_measuring(depths: Sequence[DepthCost]) -> list[DepthCost]:
    """Return the boundaries that may keep enough copying, and the next deeper boundary.

    Boundaries with a speed-up limit below LEAST_LIMIT are omitted.
    """
    hopeful = [may_copy(depth.retention) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    return [depth for depth in depths[:n_worth] if depth.speedup_limit >= LEAST_LIMIT]


def deepest_within(budget: Budget, depths: Sequence[DepthCost]) -> DepthCost | None:
    """Return the deepest boundary within a budget, None if no boundary is."""
    inside = [d for d in depths if d.quality is not None and is_inside(budget, d.quality)]
    return min(inside, key=lambda depth: depth.boundary, default=None)
