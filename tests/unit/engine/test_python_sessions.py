"""Sessions of the Python API: early ends, undoing, saving and loading."""

import os
import signal
from typing import Any

import pytest

from pop_base.errors import OutputExistsError
from pop_local import ChatSession, ContextFullError, Document, PopError, Turn
from support.calls import first_of
from support.programs import GREEDY, QUESTION, opened

# --- answers that end early


def test_closed_stream_keeps_its_text(model):
    session = model.session()
    seen = []
    for piece in session.stream(QUESTION, **GREEDY):
        seen.append(piece)
        break
    assert [turn.answer for turn in session.conversation.turns] == seen
    stream = session.stream("more", **GREEDY)
    piece = next(stream)
    answer = session.chat("again", **GREEDY)
    assert [turn.answer for turn in session.conversation.turns] == [*seen, piece, answer.text]
    assert list(stream) == []
    assert session.stats.n_answers == 1


def test_ctrl_c_keeps_the_text(model):
    session = model.session()
    pieces: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        for piece in session.stream(QUESTION, should_stop=lambda: press_at(pieces, 3), **GREEDY):
            pieces.append(piece)
    assert session.conversation.turns[0].answer == "".join(pieces)
    assert session.chat("more", **GREEDY).stats.n_cached > 0
    with pytest.raises(KeyboardInterrupt):
        session.chat(QUESTION, on_prefill=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert len(session.conversation.turns) == 2


def press_at(pieces: list[str], n: int) -> bool:
    if len(pieces) == n:
        os.kill(os.getpid(), signal.SIGINT)
    return False


@pytest.mark.parametrize("callback", ["on_prefill", "should_stop"])
def test_callbacks_may_close_their_stream(model, callback):
    session = model.session()
    n_refused = 0

    def close(*_: int) -> bool:
        nonlocal n_refused
        stream.close()
        with pytest.raises(PopError, match="still generating"):
            session.chat("more")
        n_refused += 1
        return False

    options: Any = {callback: close}
    stream = session.stream(QUESTION, **GREEDY, **options)
    assert list(stream) == []
    assert n_refused > 0
    assert stream.stats is not None and stream.stats.finish_reason == "interrupted"
    assert stream.stats.n_decoded == 0
    assert session.conversation.turns == ()
    assert session.chat(QUESTION, **GREEDY).stats.n_decoded == 8


def test_concurrent_answers_are_refused(model):
    first = model.stream(QUESTION, **GREEDY)
    next(first)
    second = model.stream("a b", **GREEDY)
    expected = list(second)
    with pytest.raises(PopError, match="another answer") as caught:
        next(first)
    assert "read each answer to the end" in caught.value.hint
    assert list(first) == []
    first_of(model).cache.clear()
    assert list(model.stream("a b", **GREEDY)) == expected


@pytest.mark.parametrize("displace", ["clear", "chat"])
def test_prompt_displaced_during_prefill_is_refused(model, displace):
    def on_prefill(done: int, total: int) -> None:
        if done == total:  # inside the interruptible part
            first_of(model).cache.clear() if displace == "clear" else model.chat("a b", **GREEDY)

    session = model.session()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(PopError, match="another answer"):
        session.chat(QUESTION, on_prefill=on_prefill, **GREEDY)
    assert signal.getsignal(signal.SIGINT) is before
    assert session.conversation.turns == ()
    expected = session.chat(QUESTION, **GREEDY).text
    first_of(model).cache.clear()
    assert model.chat(QUESTION, **GREEDY).text == expected


# --- retry, edit and undo


def questions(session: ChatSession) -> list[str]:
    return [turn.question for turn in session.conversation.turns]


def test_last_question_can_be_repeated_or_changed(model):
    session = model.session(system="Be brief.")
    first = session.chat(QUESTION, documents=["i j k"], **GREEDY)
    session.chat("and now?", **GREEDY)
    assert "".join(session.edit("and then?", **GREEDY)) != ""
    assert questions(session) == [QUESTION, "and then?"]
    undone = session.undo()
    assert undone is not None and undone.question == "and then?"
    again = session.retry(**GREEDY)
    assert "".join(again) == first.text
    assert again.stats is not None and again.stats.n_cached > 100
    assert [document.text for document in session.conversation.turns[0].documents] == ["i j k"]
    assert session.stats.n_answers == len(session.answer_stats) == 4


def test_unanswered_question_is_dropped(model):
    session = model.session()
    session.chat(QUESTION, **GREEDY)
    with pytest.raises(ContextFullError):
        session.chat("more", documents=["i j k"], min_answer=5000)
    assert session.dropped == session.last_asked == Turn("more", (Document("a text", "i j k"),))
    assert questions(session) == [QUESTION]
    stream = session.edit("much more", **GREEDY)
    assert session.dropped is not None, "the answer ended before its first token"
    stream = session.retry(**GREEDY)
    assert next(stream)
    assert session.dropped is None
    assert questions(session) == [QUESTION, "much more"]
    session.forget_oldest(1)
    assert questions(session) == ["much more"]


def test_clear_keeps_the_system_prompt(model):
    session = model.session()
    session.system = "Be brief."
    session.chat(QUESTION, **GREEDY)
    session.forget()
    assert (session.system, questions(session)) == ("Be brief.", [])
    assert (session.undo(), session.answer_stats) == (None, ())
    with pytest.raises(PopError, match="no question to answer again"):
        session.retry()


def test_conversation_continues_with_another_model(chat_model, model):
    session = model.session()
    session.chat(QUESTION, **GREEDY)
    first = session.chat("and now?", **GREEDY).stats
    with opened(chat_model) as other:
        session.undo()
        session.engine = other.engine
        second = session.chat("and now?", **GREEDY).stats
    assert (second.n_prompt, second.n_cached) == (first.n_prompt, 0) != (0, first.n_cached)


# --- saving


def test_saved_session_continues(chat_model, model, tmp_path):
    session = model.session(system="Be brief.")
    session.chat(QUESTION, **GREEDY)
    path = session.save(tmp_path / "new folder" / "talk")
    assert path == tmp_path / "new folder" / "talk.popsession"
    with opened(chat_model) as fresh:
        resumed = fresh.load_session(path)
        assert resumed.conversation == session.conversation
        first = resumed.chat("and now?", **GREEDY)
        assert (resumed.undo() is not None, first.stats.n_cached) == (True, 0)
        assert resumed.chat("and now?", **GREEDY).text == first.text


def test_rejects_invalid_session_paths(model, tmp_path):
    session = model.session()
    session.chat(QUESTION, **GREEDY)
    path = session.save(tmp_path / "talk.popsession")
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="exists"):
        session.save(path)
    assert path.read_bytes() == before
    session.chat("more", **GREEDY)
    session.save(path, overwrite=True)
    assert len(model.load_session(path).conversation.turns) == 2
    with pytest.raises(PopError, match=r"no session .*missing"):
        model.load_session(tmp_path / "missing")
    with pytest.raises(PopError, match="cannot create"):
        session.save(path / "below" / "talk")


def test_saving_while_an_answer_streams_ends_it(model, tmp_path):
    session: ChatSession = model.session()
    stream = session.stream(QUESTION, **GREEDY)
    piece = next(stream)
    saved = model.load_session(session.save(tmp_path / "talk"))
    assert [turn.answer for turn in saved.conversation.turns] == [piece]
    assert list(stream) == []
