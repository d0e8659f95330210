"""Test how answers are written to a terminal and to a pipe."""

import io
import sys

import pytest

from pop_local.ui.chat.screen import Screen


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def write(monkeypatch):
    """Return a function that writes an answer to a stream and returns the output."""

    def write(stream: io.StringIO, *pieces: str) -> str:
        monkeypatch.setattr(sys, "stdout", stream)
        screen = Screen()
        for piece in pieces:
            screen.text(piece)
        screen.end_answer()
        return stream.getvalue()

    return write


def test_model_cannot_move_the_cursor(write):
    pieces = "a\x1b[2Jb", "\x07\x9b1m\tc"
    assert write(Terminal(), *pieces) == "a[2Jb1m\tc\n"
    assert write(io.StringIO(), *pieces) == "".join(pieces) + "\n"


def test_answers_end_their_line_once(write):
    for pieces, output in ((["a", "b"], "ab\n"), (["a\n"], "a\n"), (["a\n", ""], "a\n")):
        assert write(io.StringIO(), *pieces) == output
