"""Test that untrusted text never controls the terminal: file names, metadata, errors."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pop_base.errors import PopError
from pop_base.progress import Unit
from pop_local.cli import app
from pop_local.ui import console, error_output, progress_bars
from pop_local.ui.console import printable
from pop_local.ui.tables import print_json
from support.synthetic import make_gguf

# Sequences that set the title, clear the screen and reverse the text, and a CSI of C1.
EVIL = "a\x1b]0;owned\x07\x1b[2J\u202eb\x9b31m"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\u202eb\x9b31m"
STEERING = ("\x1b", "\x07", "\x9b", "\u202e")


def is_harmless(text: str) -> bool:
    return not any(char in text for char in STEERING)


def test_escapes_only_control_characters():
    assert printable(EVIL) == SHOWN
    assert printable("für 日本 \N{GRINNING FACE}") == "für 日本 \N{GRINNING FACE}"
    assert printable("a\nb\tc", kept="\n") == "a\nb\\tc"
    assert printable("\udcff") == r"\udcff"


@pytest.mark.parametrize(
    "tell",
    [
        console.note,
        console.warn,
        lambda text: error_output.show(PopError(text, text)),
        lambda text: error_output.show(
            error_output.as_pop_error(FileNotFoundError(2, "gone", text))
        ),
    ],
)
def test_messages_escape_control_characters(tell, capsys):
    tell(f"{EVIL} :boom: [bold]")
    shown = capsys.readouterr().err
    assert SHOWN in shown.replace("\n", "")
    assert ":boom: [bold]" in shown
    assert is_harmless(shown)


def test_data_is_escaped_only_in_terminal(monkeypatch, capsys):
    console.say(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"
    monkeypatch.setattr(console.out, "_force_terminal", True)
    console.say(f"{EVIL}\nnext")
    assert capsys.readouterr().out == f"{SHOWN}\nnext\n"


def test_json_escapes_control_characters(capsys):
    print_json([EVIL, "\udcff", Path("a\x85")])
    shown = capsys.readouterr().out
    assert is_harmless(shown.replace("\u202e", ""))
    assert json.loads(shown) == [EVIL, "\udcff", "a\x85"]


def test_progress_label_escapes_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(console.err, "_force_terminal", True)
    monkeypatch.setattr(console.err, "is_interactive", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bars.stage_progress(EVIL, Unit.TOKENS) as advance:
        advance(1, 2)
    shown = capsys.readouterr().err
    assert r"a\x1b]0" in shown
    assert "\x1b]0" not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", EVIL],
        ["bench", EVIL],
        ["run", EVIL, "hi"],
        ["run", "model", "hi", EVIL],
        ["--debug", "convert", EVIL],
        [EVIL],
    ],
    ids=lambda arguments: " ".join(arguments).replace(EVIL, "EVIL"),
)
def test_error_messages_escape_arguments(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code in (1, 2)
    assert is_harmless(done.output)
    assert "owned" in done.output


def test_doctor_escapes_control_characters(monkeypatch):
    def missing():
        raise PopError(EVIL, EVIL)

    monkeypatch.setattr("pop_local.engine.llama.devices.describe_backend", missing)
    monkeypatch.setenv("POP_LOCAL_MODEL", EVIL)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.output.count(SHOWN) == 3
    assert is_harmless(done.output)


def test_model_name_is_escaped(tmp_path):
    file = make_gguf(tmp_path / f"{EVIL}.gguf", "llama")
    done = CliRunner().invoke(app, ["chat", str(file)], input="/model\n")
    assert done.exit_code == 0
    assert SHOWN in done.stderr.replace("\n", "")
    assert is_harmless(done.output)
