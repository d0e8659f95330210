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
    """A boundary is refused since the model cannot copy from its prompt with it.

    `deepest_unfitted`: the deepest boundary above it that copies with own projections, None where
    there is none.
    """

    def __init__(self, boundary: int, found: str, deepest_unfitted: int | None) -> None:
        message = broken_copy(boundary, found)
        if deepest_unfitted is None:
            super().__init__(message, "skip fewer layers", cause="copying-broken-everywhere")
        else:
            hint = f"boundary {deepest_unfitted} copies even unfitted"
            super().__init__(
                message, hint, cause="copying-broken", deepest_unfitted=deepest_unfitted
            )
        self.boundary = boundary
        self.deepest_unfitted = deepest_unfitted


def broken_copy(boundary: int, found: str) -> str:
    """Say that so many layers are skipped that the model cannot copy; let through, a warning."""
    return f"with boundary {boundary} the model can no longer copy from its prompt: {found}"


@dataclass(frozen=True)
class Trial:
    """One boundary as a search measured it; look-ups are asked for last."""

    plan: Plan
    quality: Quality
    in_budget: bool
    lookups: Lookups | None = None


class OverBudgetError(PopError):
    """Not even one skipped layer is within the budget; `trials` says what was measured."""

    def __init__(self, message: str, trials: tuple[Trial, ...]) -> None:
        super().__init__(message, "allow more, or name the boundary yourself", cause="over-budget")
        self.trials = trials


class TooLittleMemoryError(PopError):
    """The machine has no room for a part of the work; `what` ends with its verb."""

    def __init__(
        self, what: str, needed_bytes: int, free_bytes: int, hint: str, *, cause: str
    ) -> None:
        super().__init__(
            f"{what} {size(needed_bytes)} of memory, {size(free_bytes)} are free",
            hint,
            cause=cause,
        )
