"""Saved sessions restore the KV cache in the same model, and only there."""

import io
import os
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from pop_converter.base.errors import PopError
from pop_converter.gguf.header import read_header
from pop_local.config.settings import sessions_dir
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.sessions import session_file
from pop_local.engine.sessions.chat_session import ChatSession
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import Sessions
from pop_local.texts.document_readers import Document
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from support.calls import text_of
from support.conversations import QUESTION, answered, follow_up, opened
from support.converted import converted, tiny
from support.scripted_chat import Transcript
from support.synthetic import TEMPLATE, make_gguf


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_a_loaded_session_continues_from_its_kv_cache(chat_model, sessions, mode):
    model = opened(chat_model)
    model.engine.set_mode(mode)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    path = sessions.path("talk")
    assert [at.stat().st_mode & 0o077 for at in (path, path.parent)] == [0, 0]
    expected, _ = follow_up(model, said)
    fresh = opened(chat_model)
    restored = sessions.load("talk", fresh.engine)
    assert (restored.reread, restored.session.conversation) == ("", said)
    assert fresh.engine.pruning.mode is mode
    text, n_read = follow_up(fresh, said)
    assert text == expected
    assert n_read < 50 < restored.session.n_tokens


def test_only_the_cells_in_use_are_saved(chat_model, sessions):
    said = answered(opened(chat_model), QUESTION)
    sizes = []
    for n_ctx in (1024, 4096):
        model = opened(chat_model, n_ctx=n_ctx)
        answered(model, QUESTION)
        sizes.append(sessions.save("talk", model.engine, said))
    assert sizes[1] - sizes[0] < 10_000


def test_a_file_name_with_lone_surrogates_is_saved(chat_model, sessions):
    said = Conversation("", (Turn("What?", (Document("\udcff.txt", "Words."),), "Words."),))
    sessions.save("talk", opened(chat_model).engine, said, with_cache=False)
    [stored] = sessions.listed()
    assert stored.session is not None
    assert stored.session.conversation.turns[0].documents == (Document("?.txt", "Words."),)


@pytest.mark.parametrize("now_s", [0.0, 5e9])  # 1970 and 2128
def test_a_clock_outside_of_zips_range_does_not_prevent_saving(
    chat_model, sessions, monkeypatch, now_s
):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    monkeypatch.setattr(time, "time", lambda: now_s)
    sessions.save("talk", model.engine, said)
    assert sessions.load("talk", model.engine).session.conversation == said


@pytest.mark.skipif(os.name == "nt", reason="a file that is read cannot be replaced")
def test_loading_a_session_survives_its_replacement(chat_model, sessions, monkeypatch):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    longer = answered(model, *said.turns, Turn("and now?"))
    sessions.save("other", model.engine, longer)

    def replaced(*arguments, real=session_file._difference):
        sessions.path("other").replace(sessions.path("talk"))
        return real(*arguments)

    monkeypatch.setattr(session_file, "_difference", replaced)
    restored = sessions.load("talk", model.engine)
    assert (restored.reread, restored.session.conversation) == ("", said)


def test_another_conversation_in_the_kv_cache_is_not_saved(chat_model, sessions):
    model = opened(chat_model)
    ours, theirs = (ChatSession(model, Conversation("Be brief.")) for _ in range(2))
    ours.chat(QUESTION.question, max_tokens=8, temperature=0.0)
    theirs.chat("my secret", max_tokens=8, temperature=0.0)
    n_tokens = model.engine.cache.n_tokens
    sessions.save("ours", model.engine, ours.conversation)
    with zipfile.ZipFile(sessions.path("ours")) as archive:
        assert archive.namelist() == ["session.json"]
    assert model.engine.cache.n_tokens == n_tokens, "the other conversation stays cached"
    fresh = opened(chat_model)
    fresh.engine.set_mode(Mode.OFF)
    restored = sessions.load("ours", fresh.engine)
    assert "another conversation" in restored.reread
    assert (restored.session.conversation, fresh.engine.pruning.mode) == (
        ours.conversation,
        Mode.CONTEXT,
    )


def test_rows_that_another_conversation_added_are_not_saved(chat_model, sessions):
    model = opened(chat_model)
    said = Conversation("Be brief.", (replace(QUESTION, answer="i j k"),))
    messages = said.plus(Turn("my secret")).messages
    list(model.ask(messages, max_tokens=2, temperature=0.0))
    cached = model.engine.context.vocabulary.detokenize(model.engine.cache.tokens.tolist())
    assert "my secret" in cached
    sessions.save("talk", model.engine, said)
    text = cached_text(sessions, model)
    assert text.endswith(QUESTION.question + "\nassistant:") and "my secret" not in text
    fresh = opened(chat_model)
    assert sessions.load("talk", fresh.engine).reread == ""
    assert follow_up(fresh, said) == follow_up(model, said)


@pytest.mark.parametrize(("stops", "answer"), [((), "hello world"), (("world",), "hello ")])
def test_an_answer_is_saved_to_its_end(chat_model, sessions, stops, answer):
    model = opened(chat_model)
    session = ChatSession(model)
    options = {"stops": stops, "grammar": 'root ::= "hello world"'}
    assert session.chat(QUESTION.question, temperature=0.0, **options).text == answer
    n_tokens = model.engine.cache.n_tokens
    sessions.save("talk", model.engine, session.conversation)
    assert cached_text(sessions, model).endswith(f"assistant:{answer.rstrip()}")
    assert (model.engine.cache.n_tokens < n_tokens) == bool(stops), (
        "a stop string's beginning is dropped"
    )


def cached_text(sessions: Sessions, model: PopModel) -> str:
    """Return the key of the saved K/V."""
    with zipfile.ZipFile(sessions.path("talk")) as archive:
        tokens = np.load(io.BytesIO(archive.read("tokens.npy")))
    return text_of(model, tokens.tolist())


@pytest.mark.parametrize("other", ["model", "boundary", "context"])
def test_foreign_kv_are_not_used(chat_model, sessions, tmp_path, other):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    if other == "context":
        different, reason = opened(chat_model, n_ctx=256), "needs a context of"
    elif other == "boundary":
        plain = make_gguf(tmp_path / "llama.gguf", "llama", chat_template=TEMPLATE)
        different = opened(converted(plain, tmp_path, boundary=6))
        reason = "a different model"
    else:
        different = opened(tiny(tmp_path, boundary=5, chat_template=TEMPLATE, seed=1))
        reason = "a different model"
    restored = sessions.load("talk", different.engine)
    assert reason in restored.reread
    assert restored.session.conversation == said
    assert different.engine.cache.n_tokens == 0


def test_another_boundary_of_the_same_file_reads_again(chat_model, sessions):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    model.engine.sequences[0].set_boundary(6)
    assert "boundary 5" in sessions.load("talk", model.engine).reread
    assert model.engine.cache.n_tokens == 0


def test_another_backend_reads_again(chat_model, sessions, monkeypatch):
    model = opened(chat_model)
    sessions.save("talk", model.engine, answered(model, QUESTION))
    monkeypatch.setattr("pop_local.engine.llama.backend.version", lambda: "9.9.9")
    assert "backend" in sessions.load("talk", model.engine).reread


def test_a_session_is_on_the_disk_before_it_has_its_name(chat_model, sessions, monkeypatch):
    model = opened(chat_model)
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(sessions.path("talk").exists()))
    sessions.save("talk", model.engine, answered(model, QUESTION))
    assert synced == [False]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".hidden", "", " a", "a ", "x" * 99])
def test_session_names_are_not_paths(chat_model, sessions, name):
    with pytest.raises(PopError, match="is not a valid session name"):
        sessions.path(name)


def test_a_failed_save_leaves_the_old_session(chat_model, sessions, monkeypatch):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    before = sessions.path("talk").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zipfile.ZipFile.writestr", fail)
    with pytest.raises(PopError, match="No space left"):
        sessions.save("talk", model.engine, said)
    assert sessions.path("talk").read_bytes() == before
    assert len(list(sessions.path("talk").parent.iterdir())) == 1


# --- in the chat


def talked(model: PopModel, *lines: str) -> tuple[Dialogue, list[str]]:
    transcript = Transcript(*lines)
    options = {"max_tokens": 4, "temperature": 0.0}
    chat = Dialogue(model, lambda *_: model, transcript, sampling=options)
    converse(chat, transcript.read_line)
    return chat, transcript.shown.splitlines()


def test_save_load_and_sessions(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    model = opened(chat_model)
    _, shown = talked(model, "/load", "a b c d " * 30, "/save one", "/save one", "/load")
    assert shown[1] == "# No saved sessions yet. To save this session, type /save NAME."
    assert shown[-5].startswith("# Saved one (")
    assert shown[-3].startswith("# Saved one (") and shown[-3].endswith("type /load one.")
    assert shown[-1].startswith("# one: 1 turn, ")
    chat, shown = talked(opened(chat_model), "/load one", "/stats", "more?")
    assert shown[1] == "# Loaded one: 1 turn."
    assert shown[2].startswith("# The cache contains ")
    assert shown[3] == "> /stats", "pruning was on and still is"
    _, in_another_mode = talked(opened(chat_model), "/full on", "/load one")
    assert in_another_mode[-1].startswith("# Fast reading is on")
    assert chat.session.answer_stats[0].n_cached > 100
    _, shown = talked(model, "/save one", "k", "/load oen", "/load ../one", "/save")
    assert shown[1] == "? Session one already exists."
    assert "# Nothing was saved." in shown
    assert "! no session is named oen; did you mean one? (/load lists the sessions)" in shown
    assert any(line.startswith("! '../one' is not a valid session name") for line in shown)


def test_cleared_and_undone_turns_are_not_saved(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    model = opened(chat_model)
    sessions = Sessions(sessions_dir())
    talked(model, "a b c d " * 30, "my secret", "/undo", "/save talk")
    text = cached_text(sessions, model)
    assert "a b c d" in text and "my secret" not in text
    talked(model, "my secret", "/clear", "/save cleared")
    with zipfile.ZipFile(sessions.path("cleared")) as archive:
        assert archive.namelist() == ["session.json"]
    _, shown = talked(opened(chat_model), "/load cleared")
    assert shown[2] == "# The cache contains 0 tokens from the session."


def test_a_session_of_another_model_is_reported_and_read_again(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    talked(opened(chat_model), "a b c d " * 30, "/save one")
    other = opened(tiny(tmp_path, boundary=5, chat_template=TEMPLATE, seed=1))
    chat, shown = talked(other, "/load one", "more?")
    assert shown[2].startswith(
        "* Cannot reuse the saved KV cache: the session was saved with a different model ("
    )
    assert shown[2].endswith("The model will read the transcript again before the next answer.")
    (stats,) = chat.session.answer_stats
    assert (stats.n_cached, stats.n_prompt > 100) == (0, True)


def test_the_chat_works_without_pruning(tmp_path):
    model = opened(make_gguf(tmp_path / "olmo.gguf", "olmo2", chat_template=TEMPLATE))
    _, shown = talked(model, "a b c d", "/stats")
    assert any(line.startswith("# Answers: 1 (") for line in shown)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of POSIX")
def test_other_files_next_to_sessions_are_ignored(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    model = opened(chat_model)
    talked(model, "a b c d", "/save talk")
    folder = sessions_dir()
    (folder / "gone.popsession").symlink_to("nowhere")
    (folder / "no$name.popsession").write_text("x")
    (folder / "folder.popsession").mkdir()
    os.mkfifo(folder / "pipe.popsession")
    (folder / "bad.popsession").write_text("x")
    _, shown = talked(model, "/load", "/load gone")
    assert [line.split()[1] for line in shown[1:3]] == ["bad:", "talk:"]
    assert shown[-1].startswith("! no session is named gone; ")


def test_too_long_a_name_for_the_disk_is_one_error(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    _, shown = talked(opened(chat_model), "a b c d", "/save " + "字" * 80, "/save talk")
    assert any(line.startswith("! cannot write ") and "too long" in line for line in shown)
    assert shown[-1].startswith("# Saved talk (")


def test_other_weights_or_rope_are_another_model(chat_model, sessions, tmp_path):
    """The two files differ only in their tensors."""
    model = opened(chat_model)
    sessions.save("talk", model.engine, answered(model, QUESTION))
    assert sessions.load("talk", opened(chat_model).engine).reread == ""
    stretched = opened(chat_model, rope_freq_base=500_000.0)
    assert "rope_freq_base 500000" in sessions.load("talk", stretched.engine).reread
    trained = bytearray(chat_model.read_bytes())
    first = read_header(chat_model)
    start = first.data_start + first.tensors[-1].offset
    trained[start : start + 64] = bytes(64)
    other = tmp_path / "other.gguf"
    other.write_bytes(trained)
    assert "a different model" in sessions.load("talk", opened(other).engine).reread


def test_a_pruned_session_restores_pruning(chat_model, sessions):
    model = opened(chat_model)
    sessions.save("talk", model.engine, answered(model, QUESTION))
    other = opened(chat_model)
    other.pruning = False
    assert sessions.load("talk", other.engine).reread == ""
    assert (other.engine.pruning.mode, other.engine.cache.n_exact) == (Mode.CONTEXT, 0)
    other.pruning = False
    assert other.engine.cache.n_tokens == 0
