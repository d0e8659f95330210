"""Exact rows of a KV cache."""

import numpy as np
import pytest

from pop_local.engine.cache.rows import CachedRows


def rows_read(*batches):
    """Return the rows after batches: strings with F for a full row, else context."""
    rows, start = CachedRows(100), 0
    for batch in batches:
        full = np.array([letter == "F" for letter in batch])
        rows.read(start, full, np.arange(start, start + len(full) + 1), keeps_states=True)
        start += len(batch)
    return rows


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
def test_rows_are_exact_as_far_as_nothing_was_pruned(batches, n_exact):
    assert rows_read(*batches).n_exact == n_exact


@pytest.mark.parametrize(
    ("passes", "n_exact"),
    [
        (((0, 1, 2),), 3),
        (((0, 1), (2, 3, 4)), 5),
        (((1, 2, 3),), 0),  # the first row is missing
        (((0, 1, 3),), 0),  # a gap: the last row attended to a projected one
        (((3, 4), (0, 1, 2)), 3),  # rows 3 and 4 ran deep too early
        (((0, 1, 2), (1, 2, 3)), 4),
        (((0, 1, 2), (0, 1)), 3),
    ],
)
def test_deep_rows_are_exact_in_order_only(passes, n_exact):
    rows = rows_read("cccccc")
    for positions in passes:
        rows.record_deep_pass(positions)
    assert rows.n_exact == n_exact


def test_removed_and_reread_rows_are_not_exact():
    rows = rows_read("FFFFFF")
    rows.forget_from(4)
    assert (rows.n_exact, rows.has_state[:6].tolist()) == (4, [True] * 4 + [False] * 2)
    rows.read(2, np.array([False, True]), np.arange(2, 5), keeps_states=True)
    assert rows.n_exact == 2
    assert not rows.is_full[4:].any()
