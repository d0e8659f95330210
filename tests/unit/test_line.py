"""Lines out of a pipe."""

import errno
import io
import sys

from pop_local.ui.chat.line import piped_line
from pop_local.ui.chat.repl import converse
from support.scripted import STATS, ScriptedModel, Transcript, scripted_chat


def test_a_line_that_is_not_utf8_is_left_out(monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe\ntwo\r\nGr\xc3\xbc\xc3\x9fe"))
    )
    model = ScriptedModel(["One.", STATS], ["Two.", STATS], ["Three.", STATS])
    screen = Transcript()
    chat = scripted_chat(model, screen)
    converse(chat, piped_line)
    assert [messages[-1].content for messages in model.asked] == ["one", "two", "Grüße"]
    assert screen.shown.count("! that line is not UTF-8 text, and is left out") == 1
    assert chat.has_failed


def test_a_pipe_that_cannot_be_read_ends_the_chat():
    """As nohup leaves it: reading on would fail for ever."""

    def unreadable(default: str = "") -> str:
        raise OSError(errno.EBADF, "Bad file descriptor")

    screen = Transcript()
    chat = scripted_chat(ScriptedModel(), screen)
    converse(chat, unreadable)
    assert screen.shown.count("! the input cannot be read: Bad file descriptor") == 1
    assert chat.has_failed
