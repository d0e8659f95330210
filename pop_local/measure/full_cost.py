"""What reading a prompt in full would have cost: measured in this run, else computed."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from converter.format import OWN
from converter.macs import exact_macs, prefill_macs
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

    def __init__(self, shape: ModelShape | None, boundary: int, projection: str = OWN) -> None:
        self._shape = shape
        self._boundary, self._projection = boundary, projection
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
        if self._shape is None or not (stats.n_skipped_exact or self._boundary):
            return 1.0
        full = self._macs(stats, lambda shape, n, n_full: prefill_macs(shape, n, None, n_full))
        if stats.n_skipped_exact:
            return full / self._macs(stats, lambda shape, n, _: exact_macs(shape, n))
        boundary, projection = self._boundary, self._projection
        return full / self._macs(
            stats, lambda shape, n, n_full: prefill_macs(shape, n, boundary, n_full, projection)
        )

    def _macs(self, stats: TurnStats, of: Callable[[ModelShape, int, int], int]) -> int:
        """Count the new tokens' work: that of all less that of the cached, none of it full."""
        assert self._shape is not None
        whole = of(self._shape, stats.n_prompt, stats.n_full)
        if not stats.n_cached:
            return whole
        return whole - of(self._shape, stats.n_cached, 0) + self._shape.head_macs


def _like(full: TurnStats, pruned: TurnStats) -> bool:
    pairs = ((full.n_full, pruned.n_evaluated), (full.n_prompt, pruned.n_prompt))
    return all(1 / _COMPARABLE <= a / b <= _COMPARABLE for a, b in pairs)
