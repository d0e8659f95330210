"""Errors of a conversion, and the trials that some of them carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pop_converter.base.errors import PopError
from pop_converter.base.numbers import size
from pop_converter.popfile.pruning_plan import Plan

if TYPE_CHECKING:
    from pop_local.measure.lookups import Lookups
    from pop_local.measure.quality import Quality


class CopyingBrokenError(PopError):
    """A boundary is refused because the model could no longer copy from its prompt."""

    def __init__(self, boundary: int, found: str) -> None:
        hint = "skip fewer layers, or search within a budget"
        super().__init__(broken_copy(boundary, found), hint, cause="copying-broken")
        self.boundary = boundary


def broken_copy(boundary: int, found: str) -> str:
    """Return the message that the model cannot copy with this boundary."""
    return f"with boundary {boundary} the model can no longer copy from its prompt: {found}"


@dataclass(frozen=True)
class Trial:
    """A measured candidate of a search; look-ups follow once all else is within the budget."""

    plan: Plan
    quality: Quality
    in_budget: bool
    lookups: Lookups | None = None


class OverBudgetError(PopError):
    """No candidate is within the budget; `trials` are the measured ones."""

    def __init__(self, message: str, trials: tuple[Trial, ...]) -> None:
        super().__init__(message, "allow more, or name the boundary", cause="over-budget")
        self.trials = trials


class TooLittleMemoryError(PopError):
    """Too little memory is free for a part of the work; `what` ends with its verb."""

    def __init__(
        self, what: str, needed_bytes: int, free_bytes: int, hint: str, *, cause: str
    ) -> None:
        super().__init__(
            f"{what} {size(needed_bytes)} of memory, {size(free_bytes)} are free",
            hint,
            cause=cause,
        )
