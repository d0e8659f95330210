"""Reuse cached rows for a prompt in which a passage was changed, inserted, or removed.

Rows that follow the first change keep their K/V and move to their new positions. The moved rows are
stale because the text before them has changed. Only the new tokens, some moved full rows, and the
prompt's last rows are decoded immediately. A later refill re-decodes the stale rows.
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.cache.align import MIN_RUN, find_runs, in_order, n_leading, window_hashes
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.shifting import can_shift
from pop_local.engine.prefill.plan import Reuse, RowRule
from pop_local.engine.prompt.prompt import Prompt

# An edit must reuse at least this many rows beyond the common prefix, or it saves too little time.
MIN_REUSED = 256
# Among this many moved rows after a change, full rows are decoded again. Otherwise SmolLM2 fails to
# copy exact strings from these rows, but not from later rows (docs/notebook/depth-on-demand.md).
_REDONE = 512
# Decoding fewer rows between two gaps takes less time than decoding the gaps in two batches.
_MIN_APART = 8


class ReusableRows:
    """The cached rows that a prompt can reuse, either as a prefix or after an edit.

    Each cached token sequence is searched only once.
    """

    def __init__(self, cache: KvCache, prompt: Prompt, rule: RowRule) -> None:
        self._prompt, self._rule = prompt, rule
        self._can_edit = rule.reuse is Reuse.EDITED and cache.settings.is_pruning
        self._context = cache.context
        self._tokens = np.asarray(prompt.tokens, np.int32)
        self._found: dict[bytes, NDArray[np.int32]] = {}

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return window_hashes(self._tokens, MIN_RUN)

    def count(self, cached: np.ndarray, images: Mapping[int, str]) -> int:
        """Return the number of reusable rows (see CountReusable)."""
        return len(self._rows(cached, images))

    def end(self, cached: np.ndarray, images: Mapping[int, str]) -> int:
        """Return the index of the row after the last reusable row (see CountReusable)."""
        return int(self._rows(cached, images).max(initial=-1)) + 1

    def _rows(self, cached: np.ndarray, images: Mapping[int, str]) -> NDArray[np.int32]:
        """Return the indices of the cached rows that the prompt can reuse, int32 [n]."""
        n_prefix = self._prompt.n_equal(cached, images)
        if self._can_pay(cached, n_prefix):
            sources = self._sources(cached)
            reused = sources[sources >= 0]
            n_kept = int((sources[: self._last_from(sources)] >= 0).sum())
            if self._pays(len(reused), n_kept, n_prefix):
                return reused
        return np.arange(n_prefix, dtype=np.int32)

    def edit(
        self, cache: KvCache, n_usable: int, must_be_full: NDArray[np.bool_]
    ) -> NDArray[np.int32] | None:
        """Return each token's cached row, int32 [n_prompt], or -1 if the token must be decoded.

        `n_usable`: the number of reusable rows in the common prefix. `must_be_full`: bool
        [n_prompt]. Returns None if an edit is impossible or would save too little time.
        """
        if not self._can_pay(cache.tokens, n_usable):
            return None
        sources = self._sources(cache.tokens).copy()
        last_from = self._last_from(sources)
        is_approximate = _follows_a_move(sources) | ~cache.is_full[sources]
        sources[must_be_full & is_approximate] = -1
        n_matched = int((sources >= 0).sum())
        sources[last_from:] = -1
        for (_, start), (end, _) in itertools.pairwise(list(gaps(sources))):
            if end - start < _MIN_APART:
                sources[start:end] = -1
        n_kept = int((sources >= 0).sum())
        return sources if self._pays(n_matched, n_kept, n_usable) else None

    def _can_pay(self, cached: np.ndarray, n_prefix: int) -> bool:
        """Return False if an edit cannot be better than reusing only the common prefix.

        All images must be in the common prefix, because a refill cannot re-decode image rows.
        """
        n_most = min(len(cached), len(self._tokens))
        has_images = self._prompt.text_from <= n_prefix
        return self._can_edit and has_images and self._pays(n_most, n_most, n_prefix)

    def _pays(self, n_matched: int, n_kept: int, n_prefix: int) -> bool:
        """Return True if an edit is better than reusing only the common prefix.

        `n_matched`: the number of cached rows that match the prompt. `n_kept`: the number of these
        rows that are not re-decoded. If half of a prompt's rows are stale, quality is lower than
        with pruning (docs/quality.md).
        """
        return n_kept >= n_prefix + MIN_REUSED and 3 * n_matched >= 2 * len(self._tokens)

    def _last_from(self, sources: NDArray[np.int32]) -> int:
        """Return the index from which an edit re-decodes all rows up to the prompt's end."""
        n_last = max(1, self._rule.tail_tokens, _n_last_redone(sources))
        return max(self._prompt.text_from, len(sources) - n_last)

    def _sources(self, cached: np.ndarray) -> NDArray[np.int32]:
        """Return the cached row that matches each token, int32 [n_prompt], with -1 for no match."""
        key = cached.tobytes()
        if key in self._found:
            return self._found[key]
        sources = np.full(len(self._tokens), -1, np.int32)
        for run in in_order(find_runs(cached, self._tokens, self._hashes)):
            sources[run.prompt : run.prompt + run.n] = np.arange(run.cached, run.cached + run.n)
        n = min(len(cached), len(sources))
        n_same = n_leading(cached[:n] == self._tokens[:n])
        sources[:n_same] = np.arange(n_same)
        is_moved = sources != np.arange(len(sources))
        if (is_moved & (sources >= 0)).any() and not can_shift(self._context):
            sources[is_moved] = -1
        self._found[key] = sources
        return sources


def _follows_a_move(sources: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return a mask of the first `_REDONE` rows of each moved run, bool [n]."""
    rows = np.arange(len(sources))
    is_change = np.diff(sources, prepend=-1) != 1
    n_since_change = rows - np.maximum.accumulate(np.where(is_change, rows, -_REDONE))
    is_moved: NDArray[np.bool_] = (sources >= 0) & (sources != rows) & (n_since_change < _REDONE)
    return is_moved


def _n_last_redone(sources: NDArray[np.int32]) -> int:
    """Return how many of a prompt's last rows to re-decode because of an edit's size.

    This is the number of tokens that the edit inserted and removed, up to a quarter of the stale
    rows. Tokens that earlier edits changed are not counted. Without this rule, some large edits
    cost the 0.5B model more than pruning does (docs/quality.md).
    """
    rows = np.flatnonzero(sources >= 0)
    if not len(rows):
        return 0
    # If a prompt repeats its beginning, some cached rows match twice.
    n_reused = len(np.unique(sources[rows]))
    n_inserted = int(rows[-1]) + 1 - n_reused
    n_removed = int(sources.max()) + 1 - n_reused
    n_stale = len(rows) - n_leading(sources == np.arange(len(sources)))
    return min(n_inserted + n_removed, n_stale // 4)


def gaps(sources: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Yield each (start, end) range of rows to decode."""
    is_gap = np.concatenate([[False], sources < 0, [False]])
    edges = np.flatnonzero(is_gap[1:] != is_gap[:-1]).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)
