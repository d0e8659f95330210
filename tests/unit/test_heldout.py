"""Held-out text: what is taken for text, and its windows."""

import pytest

from converter.errors import PopError
from pop_local.engine.model import PopModel
from pop_local.measure.heldout import given_text, shipped_text, spread_windows, tokenize


def test_windows_do_not_overlap_and_are_shared_out_evenly():
    parts = [range(1000), range(2000, 2250), range(3000, 4000)]
    windows = spread_windows(parts, 8, 100)
    flat = [token for window in windows for token in window]
    assert len(flat) == len(set(flat)) == 800
    starts = [window[0] // 1000 for window in windows]
    # The second part has room for two only.
    assert [starts.count(part) for part in (0, 2, 3)] == [3, 2, 3]


def test_a_text_that_is_too_short_names_what_is_needed():
    with pytest.raises(PopError, match=r"800 tokens are needed, it has 799"):
        spread_windows([range(799)], 8, 100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no text"), (b" \n", "no text"), (b"a\0b", "binary"), (b"\xff", "UTF")],
)
def test_what_is_not_text_is_refused(tmp_path, content, reason):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(PopError, match=reason):
        given_text(path)


def test_shipped_text_is_long_enough_and_does_not_repeat_itself(smollm2):
    shipped = shipped_text()
    tokens = tokenize(PopModel(smollm2, n_ctx=64, n_threads=1), shipped)
    assert len(tokens) == 4
    assert sum(len(part) for part in tokens) >= 25_000
    assert len(spread_windows(tokens, 32, 640)) == 32
    for part in tokens:
        grams = [tuple(part[i : i + 8]) for i in range(len(part) - 8)]
        # The rules below the heads of tables are alike.
        assert len(set(grams)) > 0.9 * len(grams)
