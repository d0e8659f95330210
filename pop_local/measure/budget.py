"""How deep a budget lets pruning go: from what was measured to the boundary, and to the next one.

Deeper is taken to be never better; what is chosen was measured as it will be used.
"""

from collections.abc import Collection, Mapping
from math import sqrt
from typing import TYPE_CHECKING

from pop_converter.base.errors import PlanError
from pop_converter.popfile.format import NO_LIMIT, Budget

if TYPE_CHECKING:
    from pop_converter.architecture.shape import ModelShape
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.quality import Quality
    from pop_local.measure.recall import Recall

NEAR_LOSSLESS = Budget(
    "near-lossless",
    max_kl=0.015,
    max_ppl_ratio=1.01,
    max_copy_ratio=1.02,
    least_retention=0.9,
    max_lost_recall=0.03,
)
BALANCED = Budget(
    "balanced",
    max_kl=0.06,
    max_ppl_ratio=1.03,
    max_copy_ratio=1.1,
    least_retention=0.85,
    max_lost_recall=0.03,
)
# Past its limits on copying a model can no longer copy from its prompt.
FAST = Budget(
    "fast",
    max_kl=0.1,
    max_ppl_ratio=1.06,
    max_copy_ratio=1.3,
    least_retention=0.7,
    max_lost_recall=0.1,
)
BUDGETS = {budget.quality: budget for budget in (NEAR_LOSSLESS, BALANCED, FAST)}

# Where copying is kept it hardly moves the retention; few draws leave as much open.
_RETENTION_GAIN = 0.05
# No fit brings back a retention this far below the limit.
_LOST_RETENTION = 0.3
# Lost facts past the limit, in standard errors: those let through, those that more documents may
# settle.
_BY_CHANCE, _UNSETTLED = 1.0, 2.0
# Standard errors; where there are few windows, these are not well known themselves.
_CLEAR = 3.0


def is_inside(budget: Budget, quality: "Quality") -> bool:
    """Tell whether all figures but recall are within the budget (`recalls`).

    A model that does not copy random tokens itself has no retention to keep.
    """
    return all(over <= 0 for over, _ in _excesses(budget, quality))


def recalls(budget: Budget, recall: "Recall") -> bool:
    """Tell whether no more facts are lost than the budget allows, give or take a standard error.

    With 24 documents, two may be lost where the limit is 3 in 100, four where it is 10 in 100.
    """
    return _least_lost(recall, _BY_CHANCE) <= budget.max_lost_recall


def is_open(budget: Budget, recall: "Recall") -> bool:
    """Tell whether some facts are lost, but not clearly too many.

    As many documents more, or another fit, may come out inside then.
    """
    is_lossy = recall.exact_lost.value > 0
    return is_lossy and _least_lost(recall, _UNSETTLED) <= budget.max_lost_recall


def _least_lost(recall: "Recall", n_errors: float) -> float:
    """The share that is lost on balance, less standard errors of as many that are lost alone."""
    lost = recall.exact_lost.value
    return lost - n_errors * sqrt(max(lost * (1 - lost), 0.0) / (recall.n_documents - 1))


def copies(budget: Budget, quality: "Quality") -> bool:
    """Tell whether copying is within the budget, by both probes; past FAST, it is lost."""
    return all(over <= 0 for over, _ in _copying_excesses(budget, quality))


def is_clear(budget: Budget, quality: "Quality") -> bool:
    """Tell whether more windows would hardly change the verdict.

    A limit is passed by more than sampling explains, or all figures are so far within theirs.
    """
    excesses = _excesses(budget, quality)
    outside = any(over > _CLEAR * error for over, error in excesses)
    return outside or all(over < -_CLEAR * error for over, error in excesses)


def may_copy(budget: Budget, retention: "Estimate | None") -> bool:
    """Tell whether so much of copying with own projections may be enough with fitted ones."""
    return keeps(budget, retention, _RETENTION_GAIN)


def is_hopeless(budget: Budget, retention: "Estimate | None") -> bool:
    """Tell whether so little of copying with own projections is left that no fit brings it back."""
    return retention is not None and retention.value < budget.least_retention - _LOST_RETENTION


def boundaries(shape: "ModelShape", divisor: int = 2) -> tuple[int, ...]:
    """Return the boundaries from the last layer alone down to half of all, or to n_layer / divisor.

    Layers that take features of images are kept. Raises PlanError for a model of one layer.
    """
    if shape.n_layer < 2:
        raise PlanError("a model of one layer has none that could be skipped")
    lowest = max(1, shape.n_deepstack, shape.n_layer // divisor)
    return tuple(range(shape.n_layer - 1, lowest - 1, -1))


def undecided(plans: Collection[int], verdicts: Mapping[int, bool]) -> tuple[int, ...]:
    """Return the boundaries whose verdict may matter: the next to ask about, then its neighbours.

    There is none when the deepest inside is known, or that there is none. `plans`: the boundaries
    that may be chosen. `verdicts`: whether each boundary measured so far is inside. The search
    starts in the middle, which is near to most models' answer. Its steps double until one boundary
    is inside and one is outside; then it halves the gap.
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
    """Return the deepest boundary inside, None when there is none."""
    return min((boundary for boundary, passed in verdicts.items() if passed), default=None)


def keeps(budget: Budget, retention: "Estimate | None", slack: float = 0.0) -> bool:
    """Tell whether so much of copying is enough, or nearly; a model that never copies keeps all."""
    return retention is None or retention.value >= budget.least_retention - slack


def _excesses(budget: Budget, quality: "Quality") -> list[tuple[float, float]]:
    """Return how far each figure is past its limit, and its standard error."""
    return [
        _excess(quality.kl_mean, budget.max_kl),
        _excess(quality.ppl_ratio, budget.max_ppl_ratio),
        *_copying_excesses(budget, quality),
    ]


def _copying_excesses(budget: Budget, quality: "Quality") -> list[tuple[float, float]]:
    found = [_excess(quality.copy_ppl_ratio, budget.max_copy_ratio)]
    if (retention := quality.induction_retention) is not None:
        found.append((budget.least_retention - retention.value, retention.se or 0.0))
    return found


def _excess(estimate: "Estimate", limit: float) -> tuple[float, float]:
    return estimate.value - limit, estimate.se or 0.0


def limits_in_words(budget: Budget) -> str:
    """The limits of a budget, in the order of `figures_in_words`; older files have fewer."""
    perplexity = facts = ""
    if budget.max_ppl_ratio < NO_LIMIT:
        perplexity = f"perplexity ratio {budget.max_ppl_ratio:g}, "
    if budget.max_lost_recall < NO_LIMIT:
        facts = f", {budget.max_lost_recall:.0%} of facts lost"
    return (
        f"KL {budget.max_kl:g}, {perplexity}copy ratio {budget.max_copy_ratio:g}, "
        f"{budget.least_retention:.0%} kept of copying random tokens{facts}"
    )


def figures_in_words(quality: "Quality", recall: "Recall | None" = None) -> str:
    """The figures that a budget limits; `recall` where facts were asked for."""
    retention = quality.induction_retention
    kept = "" if retention is None else f", {retention.value:.0%} kept of copying random tokens"
    facts = "" if recall is None else f", {recall.exact_lost.value:.0%} of facts lost"
    return (
        f"KL {quality.kl_mean.value:.4g}, perplexity ratio {quality.ppl_ratio.value:.3f}, "
        f"copy ratio {quality.copy_ppl_ratio.value:.3f}{kept}{facts}"
    )
