"""Test typing at the prompt: history, several lines, paste, completion, Ctrl-C, resizing."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is needed", allow_module_level=True)
from pop_local.ui.chat.line import _History
from support.paths import TESTS
from support.terminal import Terminal

PROGRAM = TESTS / "support" / "echo_chat.py"
PASTE = "\x1b[200~{}\x1b[201~"
UP = "\x1b[A"
ALT_ENTER = "\x1b\r"


@pytest.fixture
def history(tmp_path) -> Path:
    return tmp_path / "state" / "history"


def chat(history: Path, width: int = 80, height: int = 24, **environment: str) -> Terminal:
    started = Terminal(
        *(str(PROGRAM), str(history)),
        width=width,
        height=height,
        environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
    )
    started.expect_prompt()
    return started


def leave(terminal: Terminal) -> None:
    terminal.expect_prompt()
    terminal.end_of_input()
    assert terminal.expect_end() == 0


@pytest.fixture(scope="module")
def open_chat(tmp_path_factory) -> Iterator[Terminal]:
    started = chat(tmp_path_factory.mktemp("chat") / "history")
    yield started
    started.end_of_input()
    assert started.expect_end() == 0


@pytest.fixture
def terminal(open_chat) -> Iterator[Terminal]:
    """Return a chat that several tests share; each test leaves the chat at its prompt."""
    yield open_chat
    open_chat.resize(80, 24)


def test_history_persists_across_runs(history):
    first = chat(history)
    first.line("the first question")
    first.expect("18 characters in 1 lines: the first question")
    leave(first)
    assert history.stat().st_mode & 0o077 == 0
    second = chat(history)
    second.send(UP)
    second.expect("the first question")
    second.line("?")
    second.expect("19 characters in 1 lines")
    leave(second)


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_owner_can_read_history(tmp_path, umask):
    folder = tmp_path / "new" / "state"
    before = os.umask(umask)
    try:
        _History(folder / "history").store_string("a secret")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (folder.parent, folder, folder / "history")]
    assert modes == [0o700, 0o700, 0o600]


def test_alt_enter_adds_a_line(terminal):
    terminal.send("one" + ALT_ENTER + "two")
    terminal.line("")
    terminal.expect("7 characters in 2 lines: one")
    terminal.expect_prompt()


def test_long_line_wraps_without_marks(history):
    terminal = chat(history, width=40)
    terminal.send("0123456789" * 7 + ALT_ENTER + "next")
    terminal.expect("next")
    rows = ["> " + "0123456789" * 3 + "01234567", "  " + "89" + "0123456789" * 3, ". next"]
    assert terminal.text.split("\n") == rows
    terminal.line("")
    leave(terminal)


def test_pasted_document_is_one_question(history):
    terminal = chat(history)
    document = "\n".join(f"line {n} of a document" for n in range(1000))
    terminal.send(PASTE.format(document.replace("\n", "\r")))
    terminal.line("")
    terminal.expect(f"{len(document)} characters in 1000 lines: line 0 of a document")
    leave(terminal)
    assert not history.exists(), "the history leaves out long pastes"


def test_commands_and_paths_are_completed(history, tmp_path):
    terminal = chat(history, width=200)
    terminal.send("/sy\t")
    terminal.expect("/system")
    terminal.interrupt()
    terminal.expect_prompt()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a long name.txt").write_text("some words")
    terminal.send(f"/fi\t{tmp_path}/fol\ta l\t")
    terminal.line("")
    terminal.expect(r"a long name\.txt: 2 tokens, 0% of the context")
    terminal.send("/full o\t")
    terminal.expect("on +off|off +on")
    terminal.expect("> /full o")
    terminal.interrupt()
    terminal.expect("To quit")
    leave(terminal)


def test_ctrl_c_stops_reading_answer_and_prompt(terminal):
    terminal.line("an answer")
    terminal.expect_prompt()
    terminal.line("/stats")
    terminal.expect(r"Answers: (\d+)")
    n_before = terminal.group(1)
    terminal.line("read slowly")
    terminal.expect(r"(?=Reading the prompt .*tokens/s)")  # what follows takes its place
    terminal.interrupt()
    terminal.expect("Reading stopped after")
    terminal.expect("The question and its attachments were dropped")
    terminal.expect_prompt()
    terminal.line("speak slowly")
    terminal.expect("word1 word2")
    terminal.interrupt()
    terminal.expect("· stopped")
    terminal.expect_prompt()
    terminal.send("half a line")
    terminal.expect("half a line")
    terminal.interrupt()
    terminal.expect("To quit, type /bye or press Ctrl-D")
    terminal.line("/stats")
    terminal.expect(f"Answers: {n_before + 1}")
    terminal.expect_prompt()


def test_answer_fits_resized_terminal(terminal):
    terminal.line("speak slowly")
    terminal.expect("word9 ")
    terminal.resize(60, 20)
    terminal.expect(r"word\d\d")
    terminal.interrupt()
    terminal.expect("· stopped")
    lines = terminal.text.split("\n")
    assert max(map(len, lines)) <= 80
    terminal.expect_prompt()


def test_keys_typed_during_answer_reach_the_prompt(terminal):
    terminal.line("speak slowly, briefly")
    terminal.expect("word2")
    terminal.line("typed")
    terminal.send("ahead")
    terminal.expect("5 characters in 1 lines: typed")
    terminal.line("!")
    terminal.expect("6 characters in 1 lines: ahead!")
    terminal.expect_prompt()
