"""A fit that was learned, and whoever makes it between answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class LearnedFit:
    """A sidecar that was learned from `n_rows` tokens, and is better than the one in use.

    `speedup_limit`: how many times as fast prompts are read by it at most.
    """

    sidecar: Path
    boundary: int
    speedup_limit: float
    n_rows: int

    def __str__(self) -> str:
        return (
            f"Learned from {self.n_rows:,} tokens of your prompts: prompts are read up to"
            f" {self.speedup_limit:.1f} times as fast from now on."
        )


@dataclass(frozen=True)
class Loss:
    """The loss of the fit in use on the newest of what was read: `n_windows` pieces of it.

    KL in nats with its standard error; `is_inside`: within the budget.
    """

    n_windows: int
    kl: float
    kl_se: float
    ppl_ratio: float
    copy_ppl_ratio: float
    is_inside: bool


class Fitter(Protocol):
    """Makes lessons of what a model learns (pop_local.workflows.learning)."""

    loss: Loss | None

    @property
    def has_work(self) -> bool:
        """Whether `idle` would do something."""

    def idle(self, should_stop: Callable[[], bool]) -> LearnedFit | None:
        """Go on until there is a lesson, nothing to do, or a wish to stop. Raises PopError."""
