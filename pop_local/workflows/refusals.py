"""What a conversion refuses, or lets through with a warning, and what it knows of it."""

from converter.errors import PopError
from converter.format import Budget
from pop_local.models.sizes import size
from pop_local.workflows.results import Trial


class BrokenCopyError(PopError):
    """Context tokens skip so many layers that the model cannot copy from its prompt.

    Let through, it is a warning.
    """

    def __init__(
        self, boundary: int, found: str, hint: str = "", *, cause: str = "", **fields: object
    ) -> None:
        super().__init__(
            f"with boundary {boundary} the model can no longer copy from its prompt: {found}",
            hint,
            cause=cause,
            **fields,
        )
        self.boundary = boundary


class CopyingBrokenError(BrokenCopyError):
    """A boundary is refused since the model cannot copy from its prompt with it.

    `deepest_unfitted`: the deepest boundary above it that copies with own projections, None where
    there is none.
    """

    def __init__(self, boundary: int, found: str, deepest_unfitted: int | None) -> None:
        if deepest_unfitted is None:
            super().__init__(
                boundary, found, "skip fewer layers", cause="copying-broken-everywhere"
            )
        else:
            hint = f"boundary {deepest_unfitted} copies even unfitted"
            super().__init__(
                boundary, found, hint, cause="copying-broken", deepest_unfitted=deepest_unfitted
            )
        self.deepest_unfitted = deepest_unfitted


class OutsideBudgetError(PopError):
    """A depth that the caller named loses more than a budget allows."""

    def __init__(self, boundary: int, budget: Budget, limits: str, found: str) -> None:
        super().__init__(
            f"boundary {boundary} is outside the {budget.quality} budget ({limits}): {found}",
            "give the budget instead of the depth: the deepest inside is looked for",
            cause="outside-budget",
        )
        self.boundary = boundary
        self.budget = budget


class OverBudgetError(PopError):
    """Not even one skipped layer is within the budget; `trials` says what was measured."""

    def __init__(self, message: str, trials: tuple[Trial, ...]) -> None:
        super().__init__(message, "allow more, or name the depth yourself", cause="over-budget")
        self.trials = trials


class NotMeasuredError(PopError):
    """What own projections lose is not known; the file says nothing of it."""

    def __init__(self, reason: PopError) -> None:
        super().__init__(f"what own projections lose is not known: {reason.message}")


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
