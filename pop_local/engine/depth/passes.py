"""Deep passes: rows that stopped at the boundary run the rest of the layers."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from pop_local.base.errors import StoppedError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.interrupt import stopped_by

# The length of a chunk of refilling. On the CPU the abort callback ends it between two nodes. A
# device computes it to its end while a question waits.
CHUNK_S = 1.0
CHUNK_ON_DEVICE_S = 0.2
_FIRST_CHUNK = 64


def deepen(cache: KvCache, rows: Sequence[int], *, logits: bool = False) -> None:
    """Run these ascending rows deep, with the logits of the last one if asked for.

    Raises PopError where the backend refuses; when interrupted, StoppedError or whatever Ctrl-C
    raises.
    """
    context = cache.context
    cache.has_logits = False
    for start in range(0, len(rows), context.n_ubatch):
        piece = rows[start : start + context.n_ubatch]
        at_end = start + len(piece) == len(rows)
        with cache.slot.watching():
            if cache.slot.deepen(np.asarray(piece, np.int32), logits=logits and at_end):
                cache.rows.deepened(piece)
                if cache.learner is not None:
                    cache.learner.computed()
            cache.slot.check()
    cache.has_logits = logits


class DeepPasses:
    """Gives the rows of a cache their depth in order, in chunks as long as their time allows."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._chunk_s = CHUNK_ON_DEVICE_S if cache.context.on_device else CHUNK_S
        self._chunk = min(_FIRST_CHUNK, cache.context.n_ubatch)

    def refill(
        self, n_rows: int, should_stop: Callable[[], bool] | None, on_chunk: Callable[[], None]
    ) -> None:
        """Make the first `n_rows` exact, in order, until `should_stop` says so."""
        rows = self.cache.rows
        try:
            with stopped_by(should_stop):
                while rows.n_exact < n_rows and not (should_stop is not None and should_stop()):
                    first = rows.n_exact
                    piece = range(first, min(first + self._chunk, n_rows))
                    started_s = time.perf_counter()
                    deepen(self.cache, piece)
                    self._adapt(len(piece), time.perf_counter() - started_s)
                    on_chunk()
        except StoppedError:
            return

    def _adapt(self, n_rows: int, took_s: float) -> None:
        wanted = int(n_rows * self._chunk_s / max(took_s, 1e-6))
        self._chunk = max(1, min(wanted, 2 * self._chunk, self.cache.context.n_ubatch))
