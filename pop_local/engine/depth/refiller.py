"""Depth, afterwards: cached rows become the full model's, between answers or during one."""

import time
from collections.abc import Callable
from contextlib import suppress

from pop_converter.base.errors import StoppedError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.depth.passes import run_deep
from pop_local.engine.llama import backend
from pop_local.engine.llama.interrupt import stopped_by

# The length of a chunk of refilling. On the CPU the abort callback ends it between two nodes. A
# device computes it to its end while a question waits.
CHUNK_S = 1.0
CHUNK_ON_DEVICE_S = 0.2
_FIRST_CHUNK = 64


class Refiller:
    """Gives pruned rows of a cache their depth, once their states are kept."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._chunk_s = CHUNK_ON_DEVICE_S if cache.context.on_device else CHUNK_S
        self._chunk = min(_FIRST_CHUNK, cache.context.n_ubatch)
        self.is_on = False
        self._n_refilled = 0

    def take_refilled(self) -> int:
        """Return how many rows were refilled since this was asked before."""
        n, self._n_refilled = self._n_refilled, 0
        return n

    @property
    def held_bytes(self) -> int:
        """Memory of boundary states in bytes."""
        return backend.snapshots_size(self._cache.context.ctx)

    @property
    def n_refillable(self) -> int:
        """How many rows `refill` would make exact."""
        cache = self._cache
        redo = cache.rows.can_be_redone(cache.n_tokens)
        return cache.n_tokens - cache.n_exact if redo else 0

    def refill(
        self,
        should_stop: Callable[[], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Give all cached rows their depth, in order, until the cache is the full model's.

        Returns the number of rows done, 0 where states are not kept. `should_stop` is asked while a
        chunk runs and after it. `on_progress` gets (done_rows, total_rows).
        """
        cache = self._cache
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
            if n > 0:
                cache.has_logits = False  # the last ones came of the rows as they were
            self._n_refilled += n
        return n

    def _run_chunk(self) -> None:
        cache = self._cache
        first = cache.n_exact
        rows = range(first, min(first + self._chunk, cache.n_tokens))
        started_s = time.perf_counter()
        run_deep(cache, rows)
        self._adapt(len(rows), time.perf_counter() - started_s)

    def _adapt(self, n_rows: int, took_s: float) -> None:
        wanted = int(n_rows * self._chunk_s / max(took_s, 1e-6))
        self._chunk = max(1, min(wanted, 2 * self._chunk, self._cache.context.n_ubatch))
