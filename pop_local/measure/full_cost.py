"""What reading a prompt in full would have cost: measured in this run, else computed."""

from dataclasses import dataclass
from statistics import median

from converter.macs import exact_limit, prefill_macs
from converter.shape import ModelShape
from pop_local.engine.turn import TurnStats

# Fewer tokens say little about a long prompt, and attention makes long ones slower per token.
_LEAST_TOKENS = 64
_COMPARABLE = 2.0


@dataclass(frozen=True)
class FullCost:
    """The seconds of a full prefill, measured on this machine or by multiply-accumulates."""

    seconds: float
    is_measured: bool


class FullCosts:
    """A record of prompts that were read in full, and what it says of others."""

    def __init__(self, shape: ModelShape | None, boundary: int) -> None:
        self._shape = shape
        self._boundary = boundary
        self._measured: list[TurnStats] = []

    def record(self, stats: TurnStats) -> None:
        """Remember a prompt if it was read in full."""
        if stats.n_evaluated == stats.n_full >= _LEAST_TOKENS:
            self._measured.append(stats)

    def of(self, stats: TurnStats) -> FullCost:
        """Return what reading this prompt in full takes; tokens that were cached stay cached."""
        if stats.n_evaluated == stats.n_full:
            return FullCost(stats.prefill_s, is_measured=True)
        rates = [full.prefill_s / full.n_full for full in self._measured if _like(full, stats)]
        if rates:
            return FullCost(stats.n_evaluated * median(rates), is_measured=True)
        return FullCost(stats.prefill_s * self._limit(stats), is_measured=False)

    def _limit(self, stats: TurnStats) -> float:
        if self._shape is None:
            return 1.0
        if stats.n_skipped_exact:
            return exact_limit(self._shape, stats.n_prompt)
        if not self._boundary:
            return 1.0
        full = self._macs(stats, None)
        return full / self._macs(stats, self._boundary)

    def _macs(self, stats: TurnStats, boundary: int | None) -> int:
        """Count the new tokens' work: that of all less that of the cached, none of it full."""
        assert self._shape is not None
        whole = prefill_macs(self._shape, stats.n_prompt, boundary, stats.n_full)
        if not stats.n_cached:
            return whole
        cached = prefill_macs(self._shape, stats.n_cached, boundary, 0)
        return whole - cached + self._shape.head_macs


def _like(full: TurnStats, pruned: TurnStats) -> bool:
    pairs = ((full.n_full, pruned.n_evaluated), (full.n_prompt, pruned.n_prompt))
    return all(1 / _COMPARABLE <= a / b <= _COMPARABLE for a, b in pairs)
