"""Budgets: limits on the measured quality, and the next boundaries to measure.

The search assumes that a deeper boundary is never better.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pop_converter.base.errors import PlanError
from pop_converter.popfile.format import NO_LIMIT, Budget

if TYPE_CHECKING:
    from pop_converter.architecture.shape import ModelShape
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.lookups import Lookups
    from pop_local.measure.quality import Quality

NEAR_LOSSLESS = Budget(
    "near-lossless",
    max_kl=0.015,
    max_ppl_ratio=1.01,
    max_copy_ratio=1.02,
    max_lost_lookups=0.0,
)
BALANCED = Budget(
    "balanced",
    max_kl=0.06,
    max_ppl_ratio=1.03,
    max_copy_ratio=1.1,
    max_lost_lookups=0.02,
)
# Beyond these limits on copying, a model can no longer copy from its prompt.
FAST = Budget(
    "fast",
    max_kl=0.1,
    max_ppl_ratio=1.06,
    max_copy_ratio=1.3,
    max_lost_lookups=0.1,
)
BUDGETS = {budget.quality: budget for budget in (NEAR_LOSSLESS, BALANCED, FAST)}

# Below this share of the full model's gain on random tokens, a model can no longer copy.
LEAST_RETENTION = 0.7
# A fit hardly changes the retention of a model that copies; few draws have an error as large.
_RETENTION_GAIN = 0.05
# No fit restores a retention that is this far below the least.
_LOST_RETENTION = 0.3
# Standard errors. More than two are required, since errors of few windows are uncertain.
_CLEAR = 3.0


def is_inside(budget: Budget, quality: "Quality") -> bool:
    """Return whether all figures except look-ups are within the budget (see `keeps_lookups`)."""
    return all(over <= 0 for over, _ in _excesses(budget, quality))


def keeps_lookups(budget: Budget, lookups: "Lookups") -> bool:
    """Return whether the budget allows the loss of look-ups that the full model answers."""
    return lookups.lost <= budget.max_lost_lookups * lookups.full


def has_lost(budget: Budget, lookups: "Lookups", n_questions: int) -> bool:
    """Return early whether `n_questions` would lose more look-ups than the budget allows.

    Either more are lost already, or the right strings' probability has clearly fallen by more. The
    probability has less noise.
    """
    expected, limit = lookups.expected_lost, budget.max_lost_lookups
    has_fallen = expected.se is not None and expected.value - _CLEAR * expected.se > limit
    return lookups.lost > limit * n_questions or (has_fallen and not keeps_lookups(budget, lookups))


def copies(quality: "Quality") -> bool:
    """Return whether a model still copies from its prompt, by both probes.

    The retention does not count if the full model does not copy random tokens.
    """
    ratio = quality.copy_ppl_ratio.value
    return ratio <= FAST.max_copy_ratio and keeps(quality.induction_retention)


def is_clear(budget: Budget, quality: "Quality") -> bool:
    """Return whether more windows would hardly change the verdict.

    One figure exceeds its limit by more than sampling explains, or all are as far below theirs.
    """
    excesses = _excesses(budget, quality)
    outside = any(over > _CLEAR * error for over, error in excesses)
    return outside or all(over < -_CLEAR * error for over, error in excesses)


def may_copy(retention: "Estimate | None") -> bool:
    """Return whether fits may retain enough copying. `retention`: without a fit."""
    return keeps(retention, _RETENTION_GAIN)


def is_hopeless(retention: "Estimate | None") -> bool:
    """Return whether no fit can restore copying. `retention`: without a fit."""
    # An undefined retention is not hopeless: the fit reports why.
    least = LEAST_RETENTION - _LOST_RETENTION
    return retention is not None and retention.value < least


def boundaries(shape: "ModelShape", divisor: int = 2) -> tuple[int, ...]:
    """Return the boundaries from the last layer down to n_layer / divisor.

    Layers that read image features are kept. Raises PlanError for a model with one layer.
    """
    if shape.n_layer < 2:
        raise PlanError("the model has only one layer, which cannot be skipped")
    lowest = max(1, shape.n_deepstack, shape.n_layer // divisor)
    return tuple(range(shape.n_layer - 1, lowest - 1, -1))


def undecided(plans: Collection[int], verdicts: Mapping[int, bool]) -> tuple[int, ...]:
    """Return the boundaries to measure next, the most useful one first.

    The result is empty once the deepest boundary within the budget is known, or all exceed it.
    `plans`: the boundaries that may be chosen. `verdicts`: whether each measured boundary is within
    the budget. The search starts in the middle, near most models' result. Its steps double until
    one boundary is within the budget and another exceeds it. Then it bisects.
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


def deepest_inside(verdicts: Mapping[int, bool]) -> int | None:
    """Return the deepest boundary within the budget, None if all exceed it."""
    return min((boundary for boundary, passed in verdicts.items() if passed), default=None)


def keeps(retention: "Estimate | None", slack: float = 0.0) -> bool:
    """Return whether a retention is enough, within `slack`; None (no copying in full) is."""
    return retention is None or retention.value >= LEAST_RETENTION - slack


def _excesses(budget: Budget, quality: "Quality") -> list[tuple[float, float]]:
    """Return each figure's excess over its limit, and its standard error."""
    return [
        _excess(quality.kl_mean, budget.max_kl),
        _excess(quality.ppl_ratio, budget.max_ppl_ratio),
        _excess(quality.copy_ppl_ratio, budget.max_copy_ratio),
    ]


def _excess(estimate: "Estimate", limit: float) -> tuple[float, float]:
    return estimate.value - limit, estimate.se or 0.0


def limits_in_words(budget: Budget) -> str:
    """Return a budget's limits, in the order of `figures_in_words`."""
    limits = (
        ("KL {:g}", budget.max_kl),
        ("perplexity ratio {:g}", budget.max_ppl_ratio),
        ("copy ratio {:g}", budget.max_copy_ratio),
        ("{:.0%} of look-ups lost", budget.max_lost_lookups),
    )
    return ", ".join(form.format(limit) for form, limit in limits if limit < NO_LIMIT)


def figures_in_words(quality: "Quality", lookups: "Lookups | None" = None) -> str:
    """Return the figures that a budget limits, with look-ups if they were measured."""
    lost = "" if lookups is None else f", {lookups.lost} of {lookups.full} look-ups lost"
    return (
        f"KL {quality.kl_mean.value:.4g}, perplexity ratio {quality.ppl_ratio.value:.3f}, "
        f"copy ratio {quality.copy_ppl_ratio.value:.3f}{lost}"
    )
