"""Cheap measurements of the boundaries in the deeper half of a model.

Repeated random tokens show how much copying each boundary retains with the layers' own projections;
fits hardly change it. For boundaries that retain copying, a few windows of prose give KL and copy
ratio, with fitted projections if possible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.base.progress import Progress
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.projection import Projection
from pop_local.engine.model import PopModel
from pop_local.measure.budget import boundaries, deepest_inside, is_inside, keeps, may_copy
from pop_local.measure.estimate import Estimate
from pop_local.measure.quality import Quality, QualityReference, measure_retention

# A layer is the cliff if skipping it also loses this share of the full model's gain.
CLIFF = 0.2
# The boundary that is likely to be chosen keeps so much more than the least.
_LIKELY = 0.1
# Boundaries that save less are not worth measuring.
LEAST_LIMIT = 1.05


@dataclass(frozen=True)
class DepthCost:
    """The cost of one boundary, measured cheaply.

    `retention`: see `Quality`, with the layers' own projections. `lost_retention`: the additional
    loss of the full model's gain by skipping the boundary layer. Both are None if the full model
    has no gain. `quality`, on prose, and its `projection` are None if not measured. `calibration`
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
    tried = boundaries(model.engine.context.shape)
    retentions = measure_retention(reference, model, tried, on_progress)
    n_full = model.engine.rule.sink_tokens + model.engine.rule.tail_tokens
    return tuple(
        DepthCost(
            boundary=boundary,
            n_skipped=model.engine.context.shape.n_layer - boundary,
            speedup_limit=speedup_limit(model.engine.context.macs, LIMIT_PROMPT, boundary, n_full),
            retention=retention,
            lost_retention=lost,
        )
        for boundary, retention, lost in zip(tried, retentions, losses(retentions), strict=True)
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
    """Return the boundaries that may keep enough of copying, and the one past them.

    The likeliest to be chosen comes first, the shallowest
    where the model does not copy; boundaries that could save next to nothing are left out.
    """
    hopeful = [may_copy(depth.retention) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    wanted = [depth for depth in depths[:n_worth] if depth.speedup_limit >= LEAST_LIMIT]
    guess = deepest_inside(
        {d.boundary: keeps(d.retention, -_LIKELY) for d in depths if d.retention is not None}
    )
    return sorted(wanted, key=lambda d: abs(d.boundary - (guess or d.boundary)))


def deepest_within(budget: Budget, depths: Sequence[DepthCost]) -> DepthCost | None:
    """Return the deepest boundary within a budget, None without one."""
    inside = [d for d in depths if d.quality is not None and is_inside(budget, d.quality)]
    return min(inside, key=lambda depth: depth.boundary, default=None)
