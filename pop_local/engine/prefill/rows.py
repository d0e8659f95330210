"""What is known of the rows in the KV cache: which of them ran all layers."""

from collections.abc import Sequence

import numpy as np

from pop_local.engine.llama.batch import Outputs
from pop_local.engine.prefill.plan import RowRule


class CachedRows:
    """For each cached position of sequence 0, whether its row was full."""

    def __init__(self, n_ctx: int, rule: RowRule) -> None:
        self._is_full = np.zeros(n_ctx, dtype=bool)
        self._rule = rule

    def mark(self, start: int, end: int, full_from: int, outputs: Outputs) -> None:
        """Rows `start` to `end` were decoded in mode CONTEXT, those of `outputs` with logits."""
        positions = np.arange(start, end)
        full = (positions < self._rule.sink_tokens) | (positions >= full_from)
        if outputs is Outputs.ALL:
            full[:] = True
        elif outputs is Outputs.LAST:
            full[-1] = True
        self._is_full[start:end] = full

    def mark_all(self, start: int, end: int, is_full: bool) -> None:
        self._is_full[start:end] = is_full

    def n_usable(self, tokens: Sequence[int], cached: np.ndarray) -> int:
        """How many cached rows the prompt `tokens` may reuse.

        As many as it begins with, but no context row where the prompt's own tail must be full.
        """
        n_same = n_equal(tokens, cached)
        tail_start = max(0, len(tokens) - self._rule.tail_tokens)
        pruned = np.flatnonzero(~self._is_full[tail_start:n_same])
        return tail_start + int(pruned[0]) if pruned.size else n_same

    def saved(self, n_tokens: int) -> np.ndarray:
        is_full: np.ndarray = self._is_full[:n_tokens].copy()
        return is_full

    def restore(self, is_full: np.ndarray) -> None:
        self._is_full[: len(is_full)] = is_full


def n_equal(tokens: Sequence[int], cached: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(tokens), len(cached))
    differ = np.flatnonzero(cached[:n] != np.asarray(tokens[:n], dtype=np.intc))
    return int(differ[0]) if differ.size else n
