"""Test lines read from a pipe."""

import errno
import io
import sys

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from pop_base.errors import PopError
from pop_local.ui.chat.line import _Completer, piped_line
from pop_local.ui.chat.repl import converse
from support.scripted_chat import STATS, ScriptedModel, Transcript, scripted_chat


def piped(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_line_that_is_not_utf8_is_skipped(monkeypatch):
    piped(monkeypatch, b"one\n\xff\xfe\ntwo\r\nGr\xc3\xbc\xc3\x9fe")
    model = ScriptedModel(["One.", STATS], ["Two.", STATS], ["Three.", STATS])
    screen = Transcript()
    chat = scripted_chat(model, screen)
    converse(chat, piped_line)
    assert [messages[-1].content for messages in model.asked] == ["one", "two", "Grüße"]
    assert screen.shown.count("! skipped a line that is not UTF-8 text") == 1
    assert chat.has_failed


def test_byte_order_mark_is_not_sent(monkeypatch):
    piped(monkeypatch, "one\n".encode("utf-8-sig") * 2)
    assert [piped_line(), piped_line()] == ["one", "one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused(monkeypatch, encoding):
    """Refuse the encodings that Windows PowerShell writes."""
    piped(monkeypatch, "hi\r\nyou\r\n".encode(encoding))
    for _ in range(2):
        with pytest.raises(PopError, match="not UTF-8 text") as failure:
            piped_line()
        assert failure.value.hint == "save the input as UTF-8"


def test_words_and_paths_are_both_completed(tmp_path):
    (tmp_path / "small.gguf").touch()
    completer = _Completer({"/model": lambda: (f"{tmp_path}/smol", "other")})
    completions = completer.get_completions(Document(f"/model {tmp_path}/sm"), CompleteEvent())
    assert [completion.text for completion in completions] == [f"{tmp_path}/smol", "all.gguf"]


def test_pipe_that_cannot_be_read_ends_the_chat():
    """Fail every read, as under nohup, which closes stdin."""

    def unreadable() -> str:
        raise OSError(errno.EBADF, "Bad file descriptor")

    screen = Transcript()
    chat = scripted_chat(ScriptedModel(), screen)
    converse(chat, unreadable)
    assert screen.shown.count("! cannot read the input: Bad file descriptor") == 1
    assert chat.has_failed
