"""Test that a conversation survives a crash of its chat, and is deleted at a normal end."""

import os
import re
from pathlib import Path

import pytest

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from pop_local.ui.chat.sessions import Unsaved
from support.converted import tiny
from support.scripted_chat import Transcript
from support.synthetic import TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PopModel:
    file = tiny(tmp_path_factory.mktemp("unsaved"), boundary=5, chat_template=TEMPLATE)
    return PopModel(EngineOptions.of(file, n_threads=1, n_ctx=1024))


def talked(model: PopModel, folder: Path, *lines: str | BaseException) -> list[str]:
    transcript = Transcript(*lines)
    options = {"max_tokens": 4, "temperature": 0.0}
    chat = Dialogue(model, lambda *_: model, transcript, sampling=options)
    try:
        with Unsaved(folder) as unsaved:
            unsaved.offer(chat)
            converse(chat, transcript.read_line, unsaved.keep)
    except SystemExit:
        pass
    return transcript.shown.splitlines()


def test_crashed_chat_is_offered_until_it_is_continued(model, tmp_path):
    talked(model, tmp_path, "my question", "and more?", SystemExit(143))
    (file,) = tmp_path.glob("*.popsession")
    assert file.stat().st_mode & 0o077 == 0
    transcript = talked(model, tmp_path, "k", "/undo")
    assert re.fullmatch(
        r"\? A chat with .+\.gguf ended unexpectedly on 20.+ \(2 turns\)\."
        r" The first question was: my question",
        transcript[0],
    )
    assert transcript[-1] == "# There are no turns to remove."
    transcript = talked(model, tmp_path, "", SystemExit(143))  # Enter continues the chat
    assert "# The model will read this conversation again before the next answer." in transcript
    talked(model, tmp_path, "c", "third", SystemExit(143))
    transcript = talked(model, tmp_path, "d")
    assert "(3 turns). The first question was: my question" in transcript[0]
    assert talked(model, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["/clear", "/undo"])
def test_crashed_chat_without_turns_is_not_offered(model, tmp_path, command):
    talked(model, tmp_path, "my question", command, SystemExit(143))
    assert talked(model, tmp_path) == []
    assert list(tmp_path.glob("*.popsession")) == []


def test_no_answer_to_one_offer_skips_the_next(model, tmp_path):
    for question in ("one", "two"):
        talked(model, tmp_path, *["k"] * (question == "two"), question, SystemExit(143))
    assert len(list(tmp_path.glob("*.popsession"))) == 2
    for lines, n_asked in (((), 1), (("k", "k", "/exit"), 2)):
        transcript = talked(model, tmp_path, *lines)
        assert sum(line.startswith("? A chat with") for line in transcript) == n_asked
        assert sum(line.startswith("1 older chat also ended") for line in transcript) == 1


def test_mode_restored_with_a_conversation_is_reported(model, tmp_path):
    talked(model, tmp_path, "my question", SystemExit(143))
    model.engine.set_mode(Mode.OFF)
    try:
        transcript = talked(model, tmp_path, "c", "/exit")
    finally:
        model.engine.set_mode(Mode.CONTEXT)
    assert any(
        line.startswith("# Fast reading is on: it skips 3 of 8 layers") for line in transcript
    )


def test_its_folders_are_the_owners(model, tmp_path):
    folder = tmp_path / "state" / "unsaved"
    before = os.umask(0)
    try:
        talked(model, folder, "my question", SystemExit(143))
    finally:
        os.umask(before)
    results = [folder.parent, folder, *folder.iterdir()]
    assert [path.stat().st_mode & 0o077 for path in results] == [0] * 4


def test_piped_lines_that_ctrl_c_ended_leave_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Transcript, "is_typed", False)
    with pytest.raises(KeyboardInterrupt):
        talked(model, tmp_path, "my question", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_living_chat_is_not_offered(model, tmp_path):
    transcript = Transcript("my question")
    chat = Dialogue(model, lambda *_: model, transcript, sampling={"max_tokens": 4})
    with Unsaved(tmp_path) as unsaved:
        converse(chat, transcript.read_line, unsaved.keep)
        assert talked(model, tmp_path) == []
        assert len(list(tmp_path.glob("*.popsession"))) == 1


def test_transcript_that_cannot_be_saved_is_reported_once(model, tmp_path):
    (tmp_path / "file").write_text("")
    transcript = talked(model, tmp_path / "file" / "unsaved", "one", "two")
    assert [line[:41] for line in transcript if line.startswith("* ")] == [
        "* This chat cannot be saved automatically"
    ]
    assert sum(line.startswith("# prompt ") for line in transcript) == 2
