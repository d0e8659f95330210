"""Deep passes, which run the skipped layers for rows that stopped at the boundary."""

from collections.abc import Sequence

import numpy as np

from pop_local.engine.cache.kv_cache import KvCache


def run_deep(cache: KvCache, rows: Sequence[int], *, logits: bool = False) -> None:
    """Run a deep pass over ascending rows. `logits`: whether to compute the last row's logits.

    Raises PopError if the backend refuses, and StoppedError or the signal handler's exception if
    interrupted.
    """
    context = cache.context
    cache.has_logits = False
    for start in range(0, len(rows), context.n_ubatch):
        piece = rows[start : start + context.n_ubatch]
        at_end = start + len(piece) == len(rows)
        with cache.slot.interruptible():
            if cache.slot.run_deep(np.asarray(piece, np.int32), logits=logits and at_end):
                cache.rows.record_deep_pass(piece)
                if cache.learner is not None:
                    cache.learner.computed()
            cache.slot.raise_if_stopped()
    cache.has_logits = logits
