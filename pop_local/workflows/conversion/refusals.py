"""Conversion errors, and the measured trials that OverBudgetError stores."""

from __future__ import annotations

from dataclasses import dataclass

from pop_converter.base.errors import PopError
from pop_converter.popfile.pruning_plan import Plan
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality


class CopyingBrokenError(PopError):
    """Error for a model that can no longer copy from its prompt. `found` is the measured loss."""

    def __init__(self, boundary: int, found: str) -> None:
        hint = "skip fewer layers, or set a budget instead of a boundary"
        message = f"at boundary {boundary}, the model can no longer copy from its prompt: {found}"
        super().__init__(message, hint, cause="copying-broken")


@dataclass(frozen=True)
class Trial:
    """A measured candidate.

    `lookups` is None if the loss on held-out text already exceeds the budget.
    """

    plan: Plan
    quality: Quality
    in_budget: bool
    lookups: Lookups | None = None


class OverBudgetError(PopError):
    """Error for a budget that no candidate meets. `trials` lists the measured candidates."""

    def __init__(self, message: str, trials: tuple[Trial, ...]) -> None:
        super().__init__(message, "use a larger budget, or choose a boundary", cause="over-budget")
        self.trials = trials
