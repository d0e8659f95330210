"""Session files store a conversation as JSON, and the prompt cache stores its KV cache."""

import base64
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pop_base.errors import PopError
from pop_local.config.settings import sessions_dir
from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import read_session, write_session
from pop_local.texts.document_readers import Document
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from support.calls import first_of
from support.conversations import opened
from support.scripted_chat import Transcript
from support.synthetic import TEMPLATE, make_gguf

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PICTURE = picture_of(PNG, "dot.png")
FIRST = Turn("What is it?", (Document("notes.txt", "A list.\n"),), "A list.", (PICTURE,))
TALK = Conversation("Be brief.", (FIRST, Turn("And now?", answer="Nothing.")))
# Version 0.1.0 writes these fields, so they must never change.
FIELDS: dict[str, Any] = {
    "format": 4,
    "model": "/models/model.gguf",
    "mode": "CONTEXT",
    "system": "Be brief.",
    "turns": [
        {
            "question": "What is it?",
            "documents": [{"name": "notes.txt", "text": "A list.\n"}],
            "answer": "A list.",
            "pictures": [
                {
                    "name": "dot.png",
                    "content": base64.b64encode(PNG).decode(),
                    "width": 1,
                    "height": 1,
                }
            ],
        },
        {"question": "And now?", "documents": [], "answer": "Nothing.", "pictures": []},
    ],
}


@pytest.fixture(scope="module")
def model(chat_model) -> PopModel:
    return opened(chat_model)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "sessions" / "talk.popsession"


def test_conversation_round_trips(model, path):
    write_session(path, model.engine, TALK)
    assert json.loads(path.read_text()) == FIELDS | {"model": str(model.engine.context.files.path)}
    session = read_session(path)
    assert (session.conversation, session.mode, session.reread) == (TALK, Mode.CONTEXT, "")
    assert session.conversation.pictures[0].name == "dot.png"
    assert [at.stat().st_mode & 0o077 for at in (path, path.parent)] == [0, 0]


@pytest.mark.parametrize("has_cache", [False, True])
def test_reads_format_3_without_its_kv_cache(path, has_cache):
    turns = [{**FIELDS["turns"][0], "pictures": [{"name": "dot.png", "sha256": PICTURE.sha256}]}]
    conversation = {"system": "Be brief.", "turns": [*turns, FIELDS["turns"][1]]}
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        fields = {"format": 3, "model": "m", "mode": "OFF", "key": "", "conversation": conversation}
        archive.writestr("session.json", json.dumps(fields))
        archive.writestr(f"pictures/{PICTURE.sha256}", PNG)
        if has_cache:
            archive.writestr("kv.bin", b"cells")
    session = read_session(path)
    assert (session.conversation, session.mode) == (TALK, Mode.OFF)
    assert session.reread == ("it was saved by an earlier version" if has_cache else "")


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_loaded_session_restores_its_mode(chat_model, model, path, mode):
    model.engine.set_mode(mode)
    write_session(path, model.engine, TALK)
    model.engine.set_mode(Mode.CONTEXT)
    other = opened(chat_model)
    other.engine.set_mode(Mode.CONTEXT if mode is Mode.OFF else Mode.OFF)
    assert other.load_session(path).conversation == TALK
    assert first_of(other).settings.mode is mode


def test_session_of_unconverted_model_keeps_the_mode(model, path, tmp_path):
    plain = opened(make_gguf(tmp_path / "olmo.gguf", "olmo2", chat_template=TEMPLATE))
    write_session(path, plain.engine, TALK)
    model.load_session(path)
    assert model.pruning
    write_session(path, model.engine, TALK)
    assert plain.load_session(path).conversation == TALK


def test_disk_store_keeps_a_sessions_kv_cache(chat_model, tmp_path):
    options: Any = {"temperature": 0.0, "max_tokens": 8}

    def opened_with_store() -> tuple[PopModel, PromptCache]:
        prompts = PromptCache(0, DiskStore(tmp_path / "states", 2**26))
        return opened(chat_model, prompt_cache=prompts), prompts

    model, prompts = opened_with_store()
    session = model.session()
    session.chat("a b c d e f g h " * 20, **options)
    path = session.save(tmp_path / "talk")
    expected = session.chat("and now?", **options)
    first_of(model).states.store()
    prompts.close()
    stats = opened_with_store()[0].load_session(path).chat("and now?", **options).stats
    assert stats.n_cached >= expected.stats.n_cached > 100


def test_file_name_with_lone_surrogates_is_saved(model, path):
    conversation = Conversation("", (Turn("What?", (Document("\udcff.txt", "Words."),), "Words."),))
    write_session(path, model.engine, conversation)
    assert read_session(path).conversation.turns[0].documents == (Document("?.txt", "Words."),)


def test_failed_save_leaves_the_old_session(model, path, monkeypatch):
    write_session(path, model.engine, TALK)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PopError, match="No space left"):
        write_session(path, model.engine, Conversation())
    assert read_session(path).conversation == TALK
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".hidden", "", " a", "a ", "x" * 99])
def test_session_names_are_not_paths(sessions, name):
    with pytest.raises(PopError, match="is not a valid session name"):
        sessions.path(name)


def damaged(place: str, value: object) -> bytes:
    """Return a session file in which a field has another value."""
    fields: Any = json.loads(json.dumps(FIELDS))
    *outer, last = place.split(".")
    at = fields
    for key in outer:
        at = at[int(key) if key.isdecimal() else key]
    at[int(last) if last.isdecimal() else last] = value
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not a session", b"null", b"{}", b"PK\3\4", b"[" * 100_000, b"\xff\xfe"),
        json.dumps(FIELDS).encode()[:-9],
        damaged("mode", "SOMETIMES"),
        damaged("system", {}),
        damaged("turns", {"a": 1}),
        damaged("turns.1.answer", None),
        damaged("turns.1.answer", "\ud800"),
        damaged("turns.1.documents", [{"name": "a", "text": 1}]),
        damaged("turns.1.pictures", [{"name": "a"}]),
        damaged("turns.1.pictures", [{"name": "a", "content": "%"}]),
    ],
)
def test_damaged_file_is_reported(path, content, sessions):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(PopError, match="damaged or is not a session file"):
        read_session(path)
    assert [(file.name, file.session) for file in sessions.listed()] == [("talk", None)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_unrelated_archive_is_reported(path, compression):
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("session.json", b" " * 1_000_000)
    with pytest.raises(PopError, match="damaged or is not a session file"):
        read_session(path)


def test_another_format_is_reported(path):
    path.parent.mkdir()
    path.write_bytes(damaged("format", 5))
    with pytest.raises(PopError, match="uses format 5, but this version reads only format 4"):
        read_session(path)


# --- in the chat


def screen_lines(model: PopModel, *lines: str) -> tuple[Dialogue, list[str]]:
    transcript = Transcript(*lines)
    options = {"max_tokens": 4, "temperature": 0.0}
    chat = Dialogue(model, lambda *_: model, transcript, sampling=options)
    converse(chat, transcript.read_line)
    return chat, transcript.shown.splitlines()


def test_chat_saves_and_loads_sessions(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    model = opened(chat_model)
    _, lines = screen_lines(model, "/load", "a b c d " * 30, "/save one", "/save one", "/load")
    assert lines[1] == "# No saved sessions yet. To save this session, type /save NAME."
    assert lines[-5].startswith("# Saved one (")
    assert lines[-3].startswith("# Saved one (") and lines[-3].endswith("type /load one.")
    assert lines[-1].startswith("# one: 1 turn, ")
    chat, lines = screen_lines(opened(chat_model), "/load one", "/stats", "more?")
    assert lines[1:3] == ["# Loaded one: 1 turn.", "> /stats"], "pruning was on and still is"
    _, in_another_mode = screen_lines(opened(chat_model), "/full on", "/load one")
    assert in_another_mode[-1].startswith("# Fast reading is on")
    assert len(chat.session.conversation.turns) == 2
    _, lines = screen_lines(model, "/save one", "k", "/load oen", "/load ../one", "/save")
    assert lines[1] == "? Session one already exists."
    assert "# Nothing was saved." in lines
    assert "! no session is named oen; did you mean one? (/load lists the sessions)" in lines
    assert any(line.startswith("! '../one' is not a valid session name") for line in lines)


def test_chat_works_without_pruning(tmp_path):
    model = opened(make_gguf(tmp_path / "olmo.gguf", "olmo2", chat_template=TEMPLATE))
    _, lines = screen_lines(model, "a b c d", "/stats")
    assert any(line.startswith("# Answers: 1 (") for line in lines)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of POSIX")
def test_other_files_next_to_sessions_are_ignored(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    model = opened(chat_model)
    screen_lines(model, "a b c d", "/save talk")
    folder = sessions_dir()
    (folder / "gone.popsession").symlink_to("nowhere")
    (folder / "no$name.popsession").write_text("x")
    (folder / "folder.popsession").mkdir()
    os.mkfifo(folder / "pipe.popsession")
    (folder / "bad.popsession").write_text("x")
    _, lines = screen_lines(model, "/load", "/load gone")
    assert [line.split()[1] for line in lines[1:3]] == ["bad:", "talk:"]
    assert lines[-1].startswith("! no session is named gone; ")


def test_overlong_file_name_is_reported(chat_model, monkeypatch, tmp_path):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path))
    _, lines = screen_lines(opened(chat_model), "a b c d", "/save " + "字" * 80, "/save talk")
    assert any(line.startswith("! cannot write ") and "too long" in line for line in lines)
    assert lines[-1].startswith("# Saved talk (")
