"""Set budgets for the loss from pruning, and choose the boundaries to measure next."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pop_base.errors import PlanError
from pop_converter.popfile.format import NO_LIMIT, Budget

if TYPE_CHECKING:
    from pop_converter.architecture.shape import ModelShape
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.lookups import Lookups
    from pop_local.measure.quality import Quality

NEAR_LOSSLESS = Budget(
    "near-lossless", max_kl=0.015, max_ppl_ratio=1.01, max_copy_ratio=1.02, max_lost_lookups=0.0
)
BALANCED = Budget(
    "balanced", max_kl=0.06, max_ppl_ratio=1.03, max_copy_ratio=1.1, max_lost_lookups=0.02
)
# A model whose copy ratio exceeds the fast budget's limit can no longer copy from its prompt.
FAST = Budget("fast", max_kl=0.1, max_ppl_ratio=1.06, max_copy_ratio=1.3, max_lost_lookups=0.1)
BUDGETS = {budget.quality: budget for budget in (NEAR_LOSSLESS, BALANCED, FAST)}

# A model that retains less than this share of the full model's gain on repeated random tokens can
# no longer copy.
LEAST_RETENTION = 0.7
# Largest gain in retention that a fit yields for models that can still copy.
_RETENTION_GAIN = 0.05


def is_inside(budget: Budget, quality: "Quality") -> bool:
    """Return True if all metrics other than lost look-ups are within the budget."""
    return (
        quality.kl_mean.value <= budget.max_kl
        and quality.ppl_ratio.value <= budget.max_ppl_ratio
        and quality.copy_ppl_ratio.value <= budget.max_copy_ratio
    )


def keeps_lookups(budget: Budget, lookups: "Lookups") -> bool:
    """Return True if the number of lost look-ups is within the budget."""
    return lookups.lost <= budget.max_lost_lookups * lookups.full


def copies(quality: "Quality") -> bool:
    """Return True if both probes show that a pruned model can still copy from its prompt."""
    ratio = quality.copy_ppl_ratio.value
    return ratio <= FAST.max_copy_ratio and _keeps(quality.induction_retention)


def may_copy(retention: "Estimate | None") -> bool:
    """Return True if a fit might enable copying. `retention`: the value measured without a fit."""
    return _keeps(retention, _RETENTION_GAIN)


def _keeps(retention: "Estimate | None", slack: float = 0.0) -> bool:
    """Return True if the retention is high enough or if the full model itself cannot copy."""
    return retention is None or retention.value >= LEAST_RETENTION - slack


def boundaries(shape: "ModelShape", divisor: int = 2) -> tuple[int, ...]:
    """Return the boundaries from the last layer down to layer n_layer / divisor.

    Layers that read image features are never skipped. Raises PlanError for one-layer models.
    """
    if shape.n_layer < 2:
        raise PlanError("the model has only one layer, which cannot be skipped")
    lowest = max(1, shape.n_deepstack, shape.n_layer // divisor)
    return tuple(range(shape.n_layer - 1, lowest - 1, -1))


def undecided(plans: Collection[int], verdicts: Mapping[int, bool]) -> tuple[int, ...]:
    """Return the boundaries to measure next, starting with the most useful.

    `plans`: the available boundaries. `verdicts`: whether each measured boundary is within the
    budget. The search assumes that a deeper boundary never improves quality. The search starts at
    the middle boundary, because most searches end nearby. The step size doubles until the search
    has found one boundary within the budget and one over the budget. Bisection follows. The result
    is empty once no more measurements are needed.
    """
    inside = min((b for b, passed in verdicts.items() if passed), default=max(plans, default=0) + 1)
    outside = max((b for b, passed in verdicts.items() if not passed and b < inside), default=-1)
    between = sorted(boundary for boundary in plans if outside < boundary < inside)
    if not between:
        return ()
    sides = {*verdicts.values()}
    if len(sides) == 1:
        step = min(max(1, max(verdicts) - min(verdicts)), len(between))
        first = between[-step] if True in sides else between[step - 1]
    else:
        first = between[len(between) // 2]
    return tuple(sorted(between, key=lambda boundary: abs(boundary - first)))


def limits_in_words(budget: Budget) -> str:
    """Describe a budget's limits, in the same order as `figures_in_words`."""
    limits = (
        ("KL {:g}", budget.max_kl),
        ("perplexity ratio {:g}", budget.max_ppl_ratio),
        ("copy ratio {:g}", budget.max_copy_ratio),
        ("{:.0%} of look-ups lost", budget.max_lost_lookups),
    )
    return ", ".join(form.format(limit) for form, limit in limits if limit < NO_LIMIT)


def figures_in_words(quality: "Quality", lookups: "Lookups | None" = None) -> str:
    """Describe the metrics that have limits, in the same order as `limits_in_words`."""
    figures = [f"KL {quality.kl_mean.value:.4g}", f"perplexity ratio {quality.ppl_ratio.value:.3f}"]
    figures.append(f"copy ratio {quality.copy_ppl_ratio.value:.3f}")
    if lookups is not None:
        figures.append(f"{lookups.lost} of {lookups.full} look-ups lost")
    return ", ".join(figures)
