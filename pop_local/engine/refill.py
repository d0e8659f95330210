"""Run the skipped layers for cached rows while the model is idle."""

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from pop_base.errors import StoppedError
from pop_local.engine.cache.align import n_leading
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import stopped_by

# Target time of a refill chunk. On the CPU, the abort callback stops a chunk between graph nodes.
# On a GPU, a new prompt waits until the chunk is complete, so GPU chunks are shorter.
CHUNK_S = 1.0
CHUNK_ON_DEVICE_S = 0.2
_FIRST_CHUNK = 64


class Refiller:
    """Refills pruned rows from their boundary states and re-decodes stale rows."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._chunk_s = CHUNK_ON_DEVICE_S if cache.context.on_device else CHUNK_S
        self._chunk = min(_FIRST_CHUNK, cache.context.n_ubatch)
        self.n_refilled = 0

    def take_refilled(self) -> int:
        """Return the number of rows refilled since the last call, and reset `n_refilled`."""
        n, self.n_refilled = self.n_refilled, 0
        return n

    @property
    def is_on(self) -> bool:
        return self._cache.settings.keeps_states

    @property
    def n_refillable(self) -> int:
        """The number of rows that `refill` would make exact."""
        cache = self._cache
        # Images are decoded from pixels, which the cache does not keep.
        if any(start >= cache.first_stale for start in cache.images):
            return 0
        rows = slice(cache.n_exact, min(cache.n_tokens, cache.first_stale))
        can_redo = (cache.has_state | cache.is_copied)[rows].all()
        return cache.n_tokens - cache.n_exact if can_redo else 0

    def refill(
        self,
        should_stop: Callable[[], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Make the cached rows exact, from the first inexact row onward.

        This method refills pruned rows in deep passes and re-decodes stale rows. Returns the number
        of rows that became exact, or 0 if a pruned row lacks its boundary state. `should_stop` is
        called during and after each chunk. `on_progress` is called with (done_rows, total_rows).
        """
        cache = self._cache
        with cache.context.locked():
            cache.slot.require_idle()
            cache.context.require_usable()
            first, total = cache.n_exact, self.n_refillable
            if not total:
                return 0
            try:
                with suppress(StoppedError), cache.slot.interruptible(), stopped_by(should_stop):
                    while cache.n_exact < cache.n_tokens and not (should_stop and should_stop()):
                        self._run_chunk()
                        if on_progress is not None:
                            on_progress(cache.n_exact - first, total)
            finally:
                n = cache.n_exact - first
                self.n_refilled += n
            return n

    def _run_chunk(self) -> None:
        cache = self._cache
        first = cache.n_exact
        has_state = cache.has_state[first : cache.n_tokens]
        end = first + n_leading(has_state == has_state[0])
        rows = range(first, min(first + self._chunk, end))
        started_s = time.perf_counter()
        cache.checkpoints.drop_after(first)
        cache.has_logits = False  # the logits depend on the pruned rows
        with cache.slot.interruptible():
            if not has_state[0]:
                self._decode_again(rows)
            elif cache.slot.run_deep(np.asarray(rows, np.int32)):
                cache.record_deep_pass(rows)
            cache.slot.raise_if_stopped()
        self._adapt(len(rows), time.perf_counter() - started_s)

    def _decode_again(self, rows: range) -> None:
        """Re-decode stale or copied rows in place, through all layers."""
        slot = self._cache.slot
        slot.begin_prefill()
        slot.set_full(0, 0)
        with slot.overwriting():
            tokens = self._cache.tokens[rows.start : rows.stop]
            self._cache.decode_again(rows.start, tokens, Outputs.NONE, np.ones(len(rows), bool))

    def _adapt(self, n_rows: int, took_s: float) -> None:
        n_target = int(n_rows * self._chunk_s / max(took_s, 1e-6))
        self._chunk = max(1, min(n_target, 2 * self._chunk, self._cache.context.n_ubatch))
