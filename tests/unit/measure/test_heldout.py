"""Held-out text and its windows."""

import pytest

from pop_base.errors import PopError
from pop_local.measure.heldout import given_text, spread_windows


def test_windows_do_not_overlap_and_are_spread_evenly():
    parts = [range(1000), range(2000, 2250), range(3000, 4000)]
    windows = spread_windows(parts, 8, 100)
    flat = [token for window in windows for token in window]
    assert len(flat) == len(set(flat)) == 800
    starts = [window[0] // 1000 for window in windows]
    # The second part has room for two windows.
    assert [starts.count(part) for part in (0, 2, 3)] == [3, 2, 3]


def test_errors_name_the_windows_that_fit():
    with pytest.raises(PopError, match="8 windows of 100 tokens: only 7 fit"):
        spread_windows([range(799)], 8, 100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no text"), (b" \n", "no text"), (b"a\0b", "binary"), (b"\xff", "UTF")],
)
def test_files_without_text_are_refused(tmp_path, content, reason):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(PopError, match=reason):
        given_text(path)
