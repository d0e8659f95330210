"""How deep pruning may go: each boundary of the deeper half, measured cheaply.

Random tokens repeated say how much of copying each boundary keeps, with the layers' own
projections: where it is kept, a fit hardly moves that. There a few windows of prose give the KL and
the copy ratio, with fitted projections if there are any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pop_converter.architecture.shape import ModelShape
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.popfile.format import Budget
from pop_converter.popfile.plan import Plan
from pop_local.base.errors import PlanError
from pop_local.base.progress import Progress
from pop_local.engine.model import PopModel
from pop_local.measure.budget import BALANCED, FAST, deepest_inside, is_inside, may_copy
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, as_planned, forced
from pop_local.measure.probes import measure_induction, read_repeated
from pop_local.measure.quality import (
    Quality,
    QualitySettings,
    Reference,
    measure_retention,
    retention,
    tokens_counted,
)

# A layer carries the cliff if skipping it, too, loses this part of the full model's gain.
CLIFF = 0.2
# What saves less is not worth measuring.
LEAST_LIMIT = 1.05


# A retention to some percent, in seconds.
_LOOK = QualitySettings(n_draws=2)


@dataclass(frozen=True)
class DepthCost:
    """One boundary, measured cheaply.

    `retention`: as in `Quality`, with the layers' own projections. `lost_retention`: what skipping
    the layer at the boundary loses on top of those above it, as a part of the full model's gain.
    Both are None where the full model has none. `own` and `fitted`: with which projections prose
    was measured; both are None where it was not worth it.
    """

    boundary: int
    n_skipped: int
    speedup_limit: float
    retention: Estimate | None
    lost_retention: float | None
    own: Quality | None = None
    fitted: Quality | None = None

    @property
    def quality(self) -> Quality | None:
        return self.fitted or self.own

    @property
    def is_cliff(self) -> bool:
        return self.lost_retention is not None and self.lost_retention >= CLIFF


def boundaries(shape: ModelShape, divisor: int = 2) -> tuple[int, ...]:
    """Return the boundaries from the last layer alone down to half of all, or to n_layer / divisor.

    Layers that take features of images are kept. Raises PlanError for a model of one layer.
    """
    if shape.n_layer < 2:
        raise PlanError("a model of one layer has none that could be skipped")
    lowest = max(1, shape.n_deepstack, shape.n_layer // divisor)
    return tuple(range(shape.n_layer - 1, lowest - 1, -1))


def own_retention(model: PopModel, plan: Plan, on_progress: Progress) -> Estimate | None:
    """Measure how much of copying random tokens the plan's boundary keeps without a fit.

    That takes seconds. The figure is `Quality.induction_retention`; `on_progress` gets
    (done_tokens, total_tokens).
    """
    as_planned(model, plan)
    with forced(model) as reader:
        ran = tokens_counted(reader, _LOOK, (), 1, 1, on_progress)
        repeated = read_repeated(reader, _LOOK.n_draws, _LOOK.seed, ran)
        pruning = Pruning(plan.boundary, _LOOK.mode)
        [found] = measure_induction(reader, repeated, [pruning], ran)
    return retention(repeated, found)


def measure_cliff(
    model: PopModel,
    reference: Reference,
    on_progress: Progress,
) -> tuple[DepthCost, ...]:
    """Measure the retention at each of `boundaries`, and what each layer adds to its loss.

    The speed-up limits are for prompts of LIMIT_PROMPT tokens; `on_progress` gets (done_tokens,
    total_tokens).
    """
    tried = boundaries(model.shape)
    retentions = measure_retention(reference, model, tried, on_progress)
    n_full = model.rule.sink_tokens + model.rule.tail_tokens
    return tuple(
        DepthCost(
            boundary=boundary,
            n_skipped=model.shape.n_layer - boundary,
            speedup_limit=speedup_limit(model.macs, LIMIT_PROMPT, boundary, n_full),
            retention=retention,
            lost_retention=lost,
        )
        for boundary, retention, lost in zip(tried, retentions, _losses(retentions), strict=True)
    )


def worth_measuring(depths: Sequence[DepthCost]) -> tuple[int, ...]:
    """Return the boundaries that may keep enough of copying, and the one past them.

    Enough is what the loosest budget asks. The likeliest to be chosen comes first, the shallowest
    where the model does not copy; boundaries that could save next to nothing are left out.
    """
    hopeful = [may_copy(FAST, depth.retention) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    wanted = [d.boundary for d in depths[:n_worth] if d.speedup_limit >= LEAST_LIMIT]
    guess = deepest_inside(
        {d.boundary: may_copy(BALANCED, d.retention) for d in depths if d.retention is not None}
    )
    return tuple(sorted(wanted, key=lambda boundary: abs(boundary - (guess or boundary))))


def with_qualities(
    depths: Sequence[DepthCost], own: Mapping[int, Quality], fitted: Mapping[int, Quality]
) -> tuple[DepthCost, ...]:
    """Return the depths with the qualities of their boundaries."""
    return tuple(
        replace(depth, own=own.get(depth.boundary), fitted=fitted.get(depth.boundary))
        for depth in depths
    )


def deepest_within(budget: Budget, depths: Sequence[DepthCost]) -> DepthCost | None:
    """Return the deepest within a budget, None when there is none.

    The figures with a fit count, where none was made those of the own projections.
    """
    inside = [d for d in depths if d.quality is not None and is_inside(budget, d.quality)]
    return min(inside, key=lambda depth: depth.boundary, default=None)


def _losses(retentions: Sequence[Estimate | None]) -> list[float | None]:
    """Return what each of some boundaries, one below the other, loses.

    What is worse than not copying at all counts as that. Where the full model does not copy, there
    is no retention at any of them.
    """
    kept = [max(0.0, each.value) for each in retentions if each is not None]
    if len(kept) < len(retentions):
        return [None] * len(retentions)
    return [before - now for before, now in pairwise((1.0, *kept))]
