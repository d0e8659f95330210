"""Estimate the time for reading a prompt in full, from measured prompts or counted work."""

from dataclasses import dataclass
from statistics import median

from pop_converter.architecture.work import Macs
from pop_local.engine.chat_messages import TurnStats

# Short prompts are poor predictors, since attention makes long prompts slower per token.
_LEAST_TOKENS = 64
_COMPARABLE = 2.0


@dataclass(frozen=True)
class FullCost:
    """The duration of a full prefill in seconds, measured here or computed from the work."""

    seconds: float
    is_measured: bool


class FullCosts:
    """Prompts that were prefilled in full, from which the cost of other prompts is estimated.

    `boundary`: the first layer that context tokens skip (None without pruning).
    """

    def __init__(self, macs: Macs, boundary: int | None) -> None:
        self._macs, self._boundary = macs, boundary
        self._measured: list[TurnStats] = []

    def record(self, stats: TurnStats) -> None:
        """Record a prompt's time and work if the prompt was prefilled in full."""
        if stats.n_evaluated == stats.n_full >= _LEAST_TOKENS:
            self._measured.append(stats)

    def of(self, stats: TurnStats) -> FullCost:
        """Return the cost of reading this prompt in full, with the same number of cached tokens."""
        if stats.n_evaluated == stats.n_full:
            return FullCost(stats.prefill_s, is_measured=True)
        rates = [full.prefill_s / full.n_full for full in self._measured if _like(full, stats)]
        if rates:
            return FullCost(stats.n_evaluated * median(rates), is_measured=True)
        return FullCost(stats.prefill_s * self._limit(stats), is_measured=False)

    def _limit(self, stats: TurnStats) -> float:
        if self._boundary is None:
            return 1.0
        n_full = 1 if stats.n_skipped_exact else stats.n_full
        return self._work(stats, None, n_full) / self._work(stats, self._boundary, n_full)

    def _work(self, stats: TurnStats, boundary: int | None, n_full: int) -> int:
        """Return the multiply-accumulates for the prompt without those for its cached rows."""
        whole = self._macs(stats.n_prompt, boundary, n_full)
        if not stats.n_cached:
            return whole
        # The counted work includes one full row per prompt, but the cached rows contain no full
        # row.
        return whole - self._macs(stats.n_cached, boundary, 1) + self._macs(1, None, 1)


def _like(full: TurnStats, pruned: TurnStats) -> bool:
    pairs = ((full.n_full, pruned.n_evaluated), (full.n_prompt, pruned.n_prompt))
    return all(1 / _COMPARABLE <= a / b <= _COMPARABLE for a, b in pairs)
