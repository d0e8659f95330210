"""Test that only the command line's hints name options and commands, not the library's."""

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest
from rich.console import Console

import pop_base
import pop_converter
import pop_local
from pop_base.errors import PopError
from pop_local.cli import COMMANDS
from pop_local.ui import error_output
from pop_local.ui.chat.slash import COMMANDS as SLASH_COMMANDS
from pop_local.ui.console import THEME
from pop_local.ui.hints import hint_of, hints_for

ROOMS = (
    "engine",
    "measure",
    "calibration",
    "models",
    "texts",
    "config",
    "workflows",
    "research",
)
FOLDERS = (
    Path(pop_base.__file__).parent,
    Path(pop_converter.__file__).parent,
    *(Path(pop_local.__file__).parent / room for room in ROOMS),
)
LIBRARY = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
# This file runs pip, with options of pip.
RUNS_PIP = "models/wheel_download.py"

# An f-string's piece may end in "--", as in f"--{name}".
OPTION = re.compile(r"(?<![\w-])--(?:[a-z]|$)")
COMMAND = re.compile(rf"pop-local (?:{'|'.join(COMMANDS)})\b")
BY_CAUSE = hints_for("causes")
SLASH_COMMAND = re.compile(rf"(?<![\w.}}/])(?:{'|'.join(SLASH_COMMANDS)})\b(?!/)")


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8")))


def in_command_line_words(text: str) -> bool:
    return any(pattern.search(text) for pattern in (OPTION, COMMAND, SLASH_COMMAND))


def causes() -> Iterator[tuple[str, set[str]]]:
    """Yield each cause of the library's errors, and the names of the error's fields."""
    for path in LIBRARY:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
                cause = given.pop("cause", None)
                # Error classes pass on a `cause` parameter.
                if cause and ast.unparse(cause) != "cause":
                    yield ast.literal_eval(cause), set(given)


def fields(words: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(words) if name}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: "/".join(path.parts[-2:]))
def test_library_messages_name_no_option_or_command(path):
    texts = [
        node.value
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if path.as_posix().endswith(RUNS_PIP):
        texts = [text for text in texts if not text.startswith("--")]
    assert [text for text in texts if in_command_line_words(text)] == []


def test_each_cause_has_exactly_one_hint():
    assert {cause for cause, _ in causes()} == set(BY_CAUSE)


def test_hints_use_only_fields_of_every_error():
    missing = [
        (cause, fields(BY_CAUSE[cause]) - names - {"hint"})
        for cause, names in causes()
        if fields(BY_CAUSE[cause]) - names - {"hint"}
    ]
    assert missing == []


def test_hint_uses_command_line_options(capsys):
    error_output.show(
        PopError("too few", "give 512 tokens", cause="too-few-tokens", n_least=512, n_default=9)
    )
    assert "hint: use --tokens 512 or more (default: 9)\n" in capsys.readouterr().err


def test_errors_and_hints_wrap_between_words(monkeypatch):
    stream = io.StringIO()
    narrow = Console(file=stream, theme=THEME, width=60, force_terminal=True, color_system=None)
    monkeypatch.setattr(error_output, "err", narrow)
    error, hint = "the model was not found in the folder " * 3, BY_CAUSE["unknown-model"] * 2
    error_output.show(PopError(error, hint))
    assert max(map(len, stream.getvalue().splitlines())) <= 60
    assert stream.getvalue().split() == ["error:", *error.split(), "hint:", *hint.split()]


def test_error_without_cause_uses_library_hint():
    assert hint_of(PopError("it broke", "mend {it}")) == "mend {it}"
    assert hint_of(PopError("it broke")) == ""


def test_question_hint_gets_no_period():
    error = PopError("unknown", "did you mean smollm2?", cause="unknown-model")
    assert hint_of(error).startswith("did you mean smollm2? `pop-local list`")
