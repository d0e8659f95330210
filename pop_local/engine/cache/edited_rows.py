"""Rows of an edited prompt: moved from the earlier prompt's rows, and decoded again in place."""

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.rows import n_leading
from pop_local.engine.llama.batch import Outputs


def move_rows(cache: KvCache, tokens: np.ndarray, sources: np.ndarray) -> bool:
    """Replace the rows by those of an edited prompt. Neither prompt may have images.

    `tokens`: int32 [n]. `sources`: int32 [n], the row with each token's K/V, or -1 for rows that
    `decode_again` must decode. The cache ends before these rows until the caller extends it, so
    that no other sequence shares them. Returns False if the memory cannot move rows.
    """
    start = n_leading(sources == np.arange(len(sources)))
    with cache.slot.locked():
        try:
            cache.slot.cells.move(start, sources[start:], tokens[start:])
        except PopError:
            return False
        cache.n_tokens = len(tokens)  # `cache.tokens` ends there
        cache.tokens[:] = tokens
        cache.n_tokens = n_leading(sources >= 0)
        cache.rows.edit(sources)
        cache.checkpoints.drop_after(start)
        cache.has_logits = False
        cache.epoch += 1
        return True


def decode_again(
    cache: KvCache, start: int, tokens: np.ndarray, outputs: Outputs, full: np.ndarray
) -> None:
    """Decode the rows from `start` on in place, within Slot.overwriting.

    `tokens`: int32 [n]. `full`: bool [n], the rows that run all layers. Raises PopError if they
    cannot be decoded.
    """
    cache.has_logits = False
    cache.slot.decode(tokens.tolist(), int(cache.rows.positions[start]), outputs)
    cache.rows.record_redone(start, full, keeps_states=cache.pruning.keeps_states)
    cache.has_logits = outputs is not Outputs.NONE
