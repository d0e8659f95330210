"""How deep a budget lets pruning go: from what was measured to the boundary, and to the next one.

Deeper is taken to be never better. The layers' own projections, which need no fit, say where to
begin (`is_promising`); what is chosen was measured as it will be used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.format import Budget

if TYPE_CHECKING:
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.quality import Quality

NEAR_LOSSLESS = Budget("near-lossless", max_kl=0.01, max_copy_ratio=1.02, least_retention=0.9)
BALANCED = Budget("balanced", max_kl=0.035, max_copy_ratio=1.12, least_retention=0.85)
# Past its limits copying from the prompt is broken (`copies`).
FAST = Budget("fast", max_kl=0.1, max_copy_ratio=1.3, least_retention=0.7)
BUDGETS = {budget.quality: budget for budget in (NEAR_LOSSLESS, BALANCED, FAST)}

# A fit divides the KL of the own projections by 3.6 to 13, at depths of 1/4 to 1/2.
_KL_GAIN = 6.0
# Where copying is kept it hardly moves the retention; few draws leave as much open.
_RETENTION_GAIN = 0.05
# Nothing turns round what lies so far below the limit.
_LOST_RETENTION = 0.3
# Beyond so many standard errors from the limit more windows would not change the verdict.
_CLEAR = 2.0


@dataclass(frozen=True)
class Bracket:
    """The boundaries to look at: from `shallowest` down to `deepest`, `guess` first."""

    deepest: int
    guess: int
    shallowest: int


def is_inside(budget: Budget, quality: "Quality") -> bool:
    """Tell whether all figures are within the budget.

    A model that does not copy random tokens itself has no retention to keep.
    """
    return all(over <= 0 for over, _ in _excesses(budget, quality))


def copies(quality: "Quality") -> bool:
    """Tell whether both probes say that the model still copies from pruned context."""
    return all(over <= 0 for over, _ in _copying_excesses(FAST, quality))


def is_clearly_outside(budget: Budget, quality: "Quality") -> bool:
    """Tell whether a limit is passed by more than sampling explains."""
    return any(over > _CLEAR * error for over, error in _excesses(budget, quality))


def is_promising(budget: Budget, own: "Quality", *, fitted: bool) -> bool:
    """Tell whether a boundary measured with own projections may be inside once `fitted`."""
    gain, slack = (_KL_GAIN, _RETENTION_GAIN) if fitted else (1.0, 0.0)
    enough = own.kl_mean.value <= gain * budget.max_kl
    return enough and keeps(budget, own.induction_retention, slack)


def may_copy(budget: Budget, retention: "Estimate | None") -> bool:
    """Tell whether so much of copying with own projections may be enough with fitted ones."""
    return keeps(budget, retention, _RETENTION_GAIN)


def is_hopeless(budget: Budget, retention: "Estimate | None") -> bool:
    """Tell whether so little of copying with own projections is left that no fit brings it back."""
    return retention is not None and retention.value < budget.least_retention - _LOST_RETENTION


def next_boundary(bracket: Bracket, verdicts: Mapping[int, bool]) -> int | None:
    """Return the boundary to measure next, None when the search is over.

    It is over when the deepest inside is known, or that there is none. `verdicts`: whether each
    boundary measured so far is inside. Away from the guess the steps grow.
    """
    if not verdicts:
        return bracket.guess
    outside, inside = open_interval(bracket, verdicts)
    if inside - outside <= 1:
        return None
    if outside < bracket.deepest:
        return max(bracket.deepest, inside - len(verdicts))
    if inside > bracket.shallowest:
        return min(bracket.shallowest, outside + len(verdicts))
    return (outside + inside) // 2


def open_interval(bracket: Bracket, verdicts: Mapping[int, bool]) -> tuple[int, int]:
    """Return the shallowest boundary outside and the deepest inside.

    What lies between is undecided. Where there is none, it is one past the bracket's end.
    """
    inside = min((b for b, passed in verdicts.items() if passed), default=bracket.shallowest + 1)
    outside = max(
        (b for b, passed in verdicts.items() if not passed and b < inside),
        default=bracket.deepest - 1,
    )
    return outside, inside


def deepest_inside(verdicts: Mapping[int, bool]) -> int | None:
    """Return the deepest boundary inside, None when there is none."""
    return min((boundary for boundary, passed in verdicts.items() if passed), default=None)


def worth_fitting(bracket: Bracket, verdicts: Mapping[int, bool], boundary: int) -> tuple[int, ...]:
    """Return `boundary` and those that may be asked for after it, the likeliest first."""
    outside, inside = open_interval(bracket, verdicts)
    near = (boundary, boundary - 1, boundary + 1)
    return tuple(b for b in near if outside < b < inside)


def keeps(budget: Budget, retention: "Estimate | None", slack: float = 0.0) -> bool:
    """Tell whether so much of copying is enough, or nearly; a model that never copies keeps all."""
    return retention is None or retention.value >= budget.least_retention - slack


def _excesses(budget: Budget, quality: "Quality") -> list[tuple[float, float]]:
    """Return how far each figure is past its limit, and its standard error."""
    return [_excess(quality.kl_mean, budget.max_kl), *_copying_excesses(budget, quality)]


def _copying_excesses(budget: Budget, quality: "Quality") -> list[tuple[float, float]]:
    found = [_excess(quality.copy_ppl_ratio, budget.max_copy_ratio)]
    if (retention := quality.induction_retention) is not None:
        found.append((budget.least_retention - retention.value, retention.se or 0.0))
    return found


def _excess(estimate: "Estimate", limit: float) -> tuple[float, float]:
    return estimate.value - limit, estimate.se or 0.0


def limits_in_words(budget: Budget) -> str:
    """What a budget allows, in the order of `figures_in_words`."""
    return (
        f"KL {budget.max_kl:g}, copy ratio {budget.max_copy_ratio:g}, "
        f"{budget.least_retention:.0%} kept of copying random tokens"
    )


def figures_in_words(quality: "Quality") -> str:
    """What a budget looks at."""
    retention = quality.induction_retention
    kept = "" if retention is None else f", {retention.value:.0%} kept of copying random tokens"
    return f"KL {quality.kl_mean.value:.4g}, copy ratio {quality.copy_ppl_ratio.value:.3f}{kept}"
