"""Test that a conversation survives a crash of its chat, and is deleted at a normal end."""

import re
from contextlib import suppress

import pytest

from pop_local.config.settings import sessions_dir
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.ui.chat import repl
from pop_local.ui.chat.dialogue import Dialogue
from support.converted import tiny
from support.scripted_chat import Transcript
from support.synthetic import TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PopModel:
    file = tiny(tmp_path_factory.mktemp("unsaved"), boundary=5, chat_template=TEMPLATE)
    return PopModel(EngineOptions.of(file, n_threads=1, n_ctx=1024))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path / "state"))
    return sessions_dir()


@pytest.fixture
def talk(model, monkeypatch):
    """Return a function that runs a chat in a terminal and returns the transcript's lines."""

    def talk(*lines: str | BaseException) -> list[str]:
        transcript = Transcript(*lines)
        monkeypatch.setattr(repl, "line_reader", lambda *_: transcript.read_line)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        options = {"max_tokens": 4, "temperature": 0.0}
        with suppress(SystemExit):
            repl.talk(Dialogue(model, lambda *_: model, transcript, sampling=options))
        return transcript.shown.splitlines()

    return talk


def test_crashed_chat_is_offered_until_it_is_loaded(talk, folder):
    talk("my question", "and more?", SystemExit(143))
    (file,) = folder.glob("*.popsession")
    assert [path.stat().st_mode & 0o077 for path in (folder.parent, folder, file)] == [0, 0, 0]
    note = talk("/undo")[0]
    offer = re.fullmatch(r"# An earlier chat ended unexpectedly .+ type (/load unsaved .+)\.", note)
    assert offer is not None
    transcript = talk(offer[1], "third", SystemExit(143))
    assert transcript[2].endswith(": 2 turns.")
    assert list(folder.glob("*.popsession")) == [file]
    assert talk(offer[1])[2].endswith(": 3 turns.")
    assert talk() == []
    assert list(folder.glob("*.popsession")) == []


@pytest.mark.parametrize("command", ["/clear", "/undo"])
def test_crashed_chat_without_turns_is_not_offered(talk, command):
    talk("my question", command, SystemExit(143))
    assert talk() == []


def test_interrupted_pipe_leaves_no_transcript(talk, folder, monkeypatch):
    monkeypatch.setattr(Transcript, "is_typed", False)
    with pytest.raises(KeyboardInterrupt):
        talk("my question", KeyboardInterrupt())
    assert list(folder.iterdir()) == []


def test_transcript_that_cannot_be_saved_is_reported_once(talk, folder):
    folder.parent.mkdir()
    folder.write_text("")
    transcript = talk("one", "two")
    assert [line[:41] for line in transcript if line.startswith("* ")] == [
        "* This chat cannot be saved automatically"
    ]
    assert sum(line.startswith("# prompt ") for line in transcript) == 2
