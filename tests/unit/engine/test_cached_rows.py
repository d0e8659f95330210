"""Exact rows of a KV cache."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.sequence_settings import SequenceSettings
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs


def cache_with(*batches: str) -> KvCache:
    """Return a cache after batches: strings with F for a full row, else context."""
    slot: Any = SimpleNamespace(
        context=SimpleNamespace(n_ctx=100, is_recurrent=False, window=0),
        locked=nullcontext,
        require_idle=lambda: None,
        decode=lambda tokens, first_position, outputs: None,
        truncate=lambda position: True,
    )
    cache = KvCache(slot, SequenceSettings(Mode.CONTEXT, 4, exact=0, keeps_states=True))
    for batch in batches:
        append(cache, batch)
    return cache


def append(cache: KvCache, batch: str) -> None:
    full = np.array([letter == "F" for letter in batch])
    cache.append([1] * len(batch), Outputs.NONE, full)


@pytest.mark.parametrize(
    ("batches", "n_exact"),
    [
        (("FFF", "F"), 4),
        (("FFF", "cccF", "FF"), 3),
        (("Fcc", "F"), 0),
        (("ccc", "FFF"), 0),
        (("FF", "FFc"), 2),
    ],
)
def test_rows_before_first_pruned_batch_are_exact(batches, n_exact):
    assert cache_with(*batches).n_exact == n_exact


@pytest.mark.parametrize(
    ("passes", "n_exact"),
    [
        ((range(3),), 3),
        ((range(2), range(2, 5)), 5),
        ((range(1, 4),), 0),  # the first row is missing
        ((range(3, 5), range(3)), 3),  # rows 3 and 4 ran deep too early
        ((range(3), range(1, 4)), 4),
        ((range(3), range(2)), 3),
    ],
)
def test_deep_passes_make_rows_exact_only_in_order(passes, n_exact):
    cache = cache_with("cccccc")
    for rows in passes:
        cache.record_deep_pass(rows)
    assert cache.n_exact == n_exact


def test_truncated_and_reread_rows_are_not_exact():
    cache = cache_with("FFFFFF")
    cache.truncate(4)
    assert (cache.n_exact, cache.has_state[:6].tolist()) == (4, [True] * 4 + [False] * 2)
    cache.truncate(2)
    append(cache, "cF")
    assert cache.n_exact == 2
    assert not cache.is_full[4:].any()
