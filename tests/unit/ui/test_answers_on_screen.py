"""Test how answers are written to a terminal and to a pipe."""

import io

from pop_local.ui.chat.screen import AnswerWriter


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_model_cannot_move_the_cursor():
    escapes = "a\x1b[2Jb\x07\x9b1m\tc\n"
    for stream, written in ((Terminal(), "a[2Jb1m\tc\n"), (io.StringIO(), escapes)):
        answer = AnswerWriter(stream)
        for piece in ("a\x1b[2Jb", "\x07\x9b1m\tc"):
            answer.push(piece)
        answer.end()
        assert stream.getvalue() == written


def test_answers_end_their_line_once():
    for pieces, written in ((["a", "b"], "ab\n"), (["a\n"], "a\n"), (["a\n", ""], "a\n")):
        stream = io.StringIO()
        answer = AnswerWriter(stream)
        for piece in pieces:
            answer.push(piece)
        answer.end()
        assert stream.getvalue() == written
