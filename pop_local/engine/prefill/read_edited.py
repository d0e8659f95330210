"""Read an edited prompt: move the shared rows, and decode the remaining rows in place."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import StoppedError
from pop_local.engine.cache.edited_rows import decode_again
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.prefill.edit import Edit
from pop_local.engine.prefill.plan import RowRule, full_rows
from pop_local.engine.prefill.read_result import OnPrefill, PrefillStoppedError, Read


def read_edited(
    cache: KvCache,
    tokens: NDArray[np.int32],
    edit: Edit,
    deep: NDArray[np.bool_],
    rule: RowRule,
    on_prefill: OnPrefill | None,
) -> Read:
    """Decode the rows without a cached source, after the cache has moved the reused rows.

    `tokens`: int32 [n_prompt]. `deep`: bool [n_prompt], the deep rows by token. Raises PopError if
    the rows cannot be decoded, and PrefillStoppedError or the signal handler's exception if
    interrupted. Then the cache keeps the rows before the first row that is not decoded.
    """
    reading = _EditRead(cache, tokens, edit, deep, rule, on_prefill)
    try:
        reading.run()
    except StoppedError as error:
        if cache.context.is_closed:
            raise
        raise PrefillStoppedError(reading.result()) from error
    return reading.result()


class _EditRead:
    """An edited prompt's read in progress."""

    def __init__(
        self,
        cache: KvCache,
        tokens: NDArray[np.int32],
        edit: Edit,
        deep: NDArray[np.bool_],
        rule: RowRule,
        on_prefill: OnPrefill | None,
    ) -> None:
        self._cache, self._edit, self._deep, self._rule = cache, edit, deep, rule
        self._on_prefill = on_prefill
        self._tokens = tokens
        self._n_prompt = len(tokens)
        self._end = (self._n_prompt, self._n_prompt)
        self._n_total = self._n_prompt - edit.n_reused
        self._epoch = cache.epoch
        is_short = self._n_total < rule.min_prompt
        self._full_from = 0 if is_short else max(0, self._n_prompt - rule.tail_tokens)
        cache.slot.begin_prefill()

    def run(self) -> None:
        cache = self._cache
        chunks = list(self._chunks())
        try:
            self._report(0)
            cache.slot.set_full(self._rule.sink_tokens, self._full_from)
            n_done = 0
            # The outer block may free the context at its exit, which the inner block uses.
            with cache.slot.interruptible(), cache.slot.overwriting():
                for (start, end), (next_start, _) in itertools.pairwise([*chunks, self._end]):
                    self._decode(start, end)
                    cache.n_tokens = next_start
                    cache.slot.raise_if_stopped()
                    n_done += end - start
                    self._report(n_done)
        except BaseException:
            if not cache.context.is_closed and cache.epoch == self._epoch:
                cache.rows.forget_from(cache.n_tokens)
                cache.forget_unfinished()
            raise

    def result(self) -> Read:
        """Return the result of the rows decoded so far."""
        cache = self._cache
        counters = cache.slot.counters
        return Read(
            n_prompt=self._n_prompt,
            n_cached=max(0, cache.n_tokens - counters.n_rows),
            counters=counters,
            n_exact=cache.n_exact,
            n_stale=int((self._edit.sources[cache.rows.first_stale : cache.n_tokens] >= 0).sum()),
            is_short=self._full_from == 0,
        )

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Yield each gap in chunks of up to a batch."""
        n_batch = self._cache.context.n_batch
        for start, end in self._edit.gaps():
            for at in range(start, end, n_batch):
                yield at, min(at + n_batch, end)

    def _decode(self, start: int, end: int) -> None:
        outputs = Outputs.LAST if end == self._n_prompt else Outputs.NONE
        positions = np.arange(start, end)
        deep = self._deep[start:end]
        full = full_rows(positions, self._rule, self._full_from, outputs) | deep
        self._cache.slot.set_deep_rows(positions[deep])
        decode_again(self._cache, start, self._tokens[start:end], outputs, full)

    def _report(self, n_done: int) -> None:
        if self._on_prefill is not None:
            self._on_prefill(n_done, self._n_total)
        if self._cache.epoch != self._epoch:
            raise DisplacedError
