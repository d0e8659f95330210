"""A learned fit, and the interface of the fitter that computes such fits between answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class LearnedFit:
    """A sidecar learned from `n_rows` tokens; `speedup_limit`: the maximum prefill speed-up."""

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
    """The current fit's loss, measured on the newest `n_windows` held-out windows.

    `kl`: the KL divergence in nats, with its standard error. `is_inside`: whether the loss is
    within the budget.
    """

    n_windows: int
    kl: float
    kl_se: float
    ppl_ratio: float
    copy_ppl_ratio: float
    is_inside: bool


class Fitter(Protocol):
    """A fitter for learned sums (implemented in pop_local.workflows.learning)."""

    loss: Loss | None

    @property
    def has_work(self) -> bool:
        """Return True if `idle` has work."""

    def idle(self, should_stop: Callable[[], bool]) -> LearnedFit | None:
        """Work until a fit is ready, no work is left, or a stop is requested. Raises PopError."""
