"""Read an edited prompt: move the reused rows and decode the other rows in place."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.prefill.edit import gaps
from pop_local.engine.prefill.plan import RowRule
from pop_local.engine.prefill.reading import OnPrefill, PromptReading, Read


class EditedReading(PromptReading):
    """A PromptReading that decodes only the rows that `KvCache.edit` left empty.

    `run` raises PopError if the rows cannot be decoded. If reading fails or is stopped, the cache
    keeps all decoded and reused rows for the next prompt.
    """

    def __init__(
        self,
        cache: KvCache,
        tokens: NDArray[np.int32],
        sources: NDArray[np.int32],
        deep: NDArray[np.bool_],
        rule: RowRule,
        on_prefill: OnPrefill | None,
    ) -> None:
        """`tokens`, `sources`: int32 [n_prompt] (see `KvCache.edit`).

        `deep`: a mask of the deep rows, bool [n_prompt].
        """
        super().__init__(cache, rule, on_prefill, int((sources < 0).sum()))
        self._tokens, self._sources, self._deep = tokens, sources, deep
        is_short = self._n_total < rule.min_prompt
        self._full_from = 0 if is_short else max(0, len(tokens) - rule.tail_tokens)

    def run(self) -> None:
        cache = self._cache
        end = (len(self._tokens), len(self._tokens))
        try:
            self._report(0)
            cache.slot.set_full(self._rule.sink_tokens, self._full_from)
            n_done = 0
            # The outer block may free the context on exit, so the inner block must exit first.
            with cache.slot.interruptible(), cache.slot.overwriting():
                for (start, stop), (next_start, _) in itertools.pairwise([*self._chunks(), end]):
                    outputs = Outputs.LAST if stop == end[0] else Outputs.NONE
                    deep = self._deep[start:stop]
                    full = self._full_rows(np.arange(start, stop), deep, self._full_from, outputs)
                    cache.decode_again(start, self._tokens[start:stop], outputs, full)
                    cache.n_tokens = next_start
                    cache.slot.raise_if_stopped()
                    n_done += stop - start
                    self._report(n_done)
        except BaseException:
            if not cache.context.is_closed and cache.epoch == self._epoch:
                self._close_gaps()
            raise

    def _close_gaps(self) -> None:
        """Remove the undecoded rows and move later reused rows down to close the gaps."""
        cache = self._cache
        is_kept = self._sources >= 0
        is_kept[: cache.n_tokens] = True
        rows = np.flatnonzero(is_kept).astype(np.int32)
        self._tokens, self._sources = self._tokens[rows], self._sources[rows]
        if not cache.edit(self._tokens, rows):
            cache.forget_from(cache.n_tokens)
            cache.forget_unfinished()

    def result(self) -> Read:
        cache = self._cache
        counters = cache.slot.counters
        return Read(
            n_prompt=len(self._deep),
            n_cached=max(0, cache.n_tokens - counters.n_rows),
            counters=counters,
            n_exact=cache.n_exact,
            n_stale=int((self._sources[cache.first_stale : cache.n_tokens] >= 0).sum()),
            is_short=self._full_from == 0,
        )

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Yield each gap between reused rows in chunks of up to one batch."""
        n_batch = self._cache.context.n_chunk
        for start, end in gaps(self._sources):
            for at in range(start, end, n_batch):
                yield at, min(at + n_batch, end)
