"""Test the whole command line: help, imports, errors, exit codes."""

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from pop_base.errors import PopError, StoppedError
from pop_local import __version__
from pop_local.cli import COMMANDS, app
from pop_local.commands.shared_options import finite, positive
from pop_local.ui import error_output
from pop_local.ui.hints import hints_for
from pop_local.ui.lazy import imported
from support.import_blocker import BLOCKER
from support.program import called, run
from support.synthetic import make_gguf

HELP_OF_ALL = (
    BLOCKER
    + """
import json
from typer.testing import CliRunner
from pop_local.cli import COMMANDS, app
found = {}
for command in ("", *COMMANDS):
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    found[command] = (repr(done.exception), done.stdout)
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def help_without_heavy() -> dict[str, tuple[str, str]]:
    """Return each command's error and help without torch and llama_cpp."""
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, timeout=60)
    report: dict[str, tuple[str, str]] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_neither_torch_nor_llama_cpp(command, help_without_heavy):
    raised, printed = help_without_heavy[command]
    assert raised in ("None", "SystemExit(0)")
    assert "Usage:" in printed
    assert command in printed


@pytest.mark.parametrize(("word", "hint"), hints_for("commands").items())
def test_command_of_another_program_gets_a_hint(word, hint):
    done = called(word, "model.gguf", COLUMNS="300")
    assert done.returncode == 2
    assert f"No such command '{word}': {hint}" in done.stderr


def test_accepts_ollama_commands(tiny):
    assert called("ls", "--json").stdout == called("list", "--json").stdout
    assert called("show", tiny).stdout == called("inspect", tiny).stdout
    assert called("help", "run").stdout == called("run", "--help").stdout
    assert called("help").stdout.strip() == called("--help").stdout.strip()


def test_accepts_llama_cpp_options(tiny):
    """Check that the options reach `run`, although the help does not list them."""
    limits = ("-c", 64, "-n", 3, "-t", 1, "-ngl", 0, "--temp", 0, "-ctk", "q8_0", "-sys", "Hi")
    done = called("run", "-m", tiny, "-p", "hello", *limits, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["stats"]["n_decoded"] == 3
    same = ("--ctx", 64, "--max-tokens", 3, "--threads", 1, "--gpu-layers", 0, "--temperature", 0)
    more = ("--cache-type-k", "q8_0", "--system", "Hi", "--json")
    assert report["text"] == json.loads(called("run", tiny, "hello", *same, *more).stdout)["text"]
    assert "--temp " not in called("run", "--help").stdout
    wrong = called("run", tiny, "hello", "-t", "x", COLUMNS="200")
    assert wrong.returncode == 2
    assert "Invalid value for '--threads'" in wrong.stderr
    wrong = called("run", tiny, "hello", "-ctv", "x", COLUMNS="200")
    assert "Invalid value for '--cache-type-v'" in wrong.stderr
    assert "hf:nowhere is not the name" in called("chat", "-hf", "nowhere").stderr.replace("'", "")


def test_top_help_imports_no_command():
    code = (
        "import sys; from pop_local.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(sorted(name for name in sys.modules if name.startswith('pop_local.commands')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_during_startup_prints_nothing():
    code = """
import runpy, sys
class Typed:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Typed())
runpy.run_module("pop_local", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


posix = pytest.mark.skipif(sys.platform == "win32", reason="bytes in names, closed streams")


PRINT_NAME = """
from pop_local import __main__ as program
from pop_local.config.settings import config_path
from pop_local.ui.console import say
program._prepare_streams()
say(str(config_path()))
"""


@pytest.mark.parametrize(
    ("encoding", "name", "written"),
    [
        pytest.param("utf-8", "bad\udce9", b"bad\xe9", marks=posix),
        ("utf-8", "→", "→".encode()),
        ("latin-1", "→é", b"\\u2192\xe9"),
    ],
)
def test_prints_any_name_to_a_pipe(encoding, name, written):
    environment = os.environ | {"POP_LOCAL_CONFIG": name, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_NAME], capture_output=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, written + os.linesep.encode())


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_stream_becomes_the_null_device(closed):
    command = f"{shlex.quote(sys.executable)} -m pop_local config {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "error" in done.stderr) == (0, False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_accepted_example(command, help_without_heavy):
    words = ["pop-local", command, *shlex.split(COMMANDS[command].example)]
    shown = " ".join(help_without_heavy[command][1].split())
    assert f"Example: pop-local {command} {COMMANDS[command].example}" in shown
    group: Any = typer.main.get_command(app)
    context = group.make_context("pop-local", words[1:], resilient_parsing=True)
    _, found, given = group.resolve_command(context, words[1:])
    context = found.make_context(command, [*given], parent=context)  # raises for wrong usage
    if hasattr(found, "resolve_command"):
        found.resolve_command(context, given)


def test_version_option_prints_version():
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"pop-local {__version__}")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["rm"], ["pull", "--nonsense"], ["run"], ["run", "x", "hi", "--threads", 513]],
)
def test_wrong_usage_exits_with_2(arguments):
    done = called(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("template", ["", "{{ messages[0]['content'] }}"])
def test_rejects_question_that_is_not_utf8(tmp_path, template):
    model = make_gguf(tmp_path / "tiny.gguf", "llama", chat_template=template)
    done = called("run", model, os.fsdecode(b"caf\xe9"), "--threads", 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the prompt is not UTF-8 text\n" in done.stderr


def test_special_tokens_in_question_are_text_by_default(tmp_path):
    template = "{{ messages[0]['content'] }}"
    model = make_gguf(tmp_path / "tiny.gguf", "llama", chat_template=template)
    words = ("run", model, "</s></s></s>", "--json", "--max-tokens", 1, "--threads", 1)
    asked = [json.loads(called(*words, *more).stdout) for more in ((), ("--parse-special",))]
    n_prompt = [found["stats"]["n_prompt"] for found in asked]
    assert n_prompt == [2 + len("</s></s></s>"), 1 + 3]  # SentencePiece adds a leading space


def test_context_length_is_rounded_up(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    done = called("run", path, "hi", "--ctx", 9, "--max-tokens", 1, "--threads", 1)
    assert done.returncode == 0
    assert "llama.cpp rounds the context length up to 256 tokens" in done.stderr


def test_debug_prints_traceback_before_error():
    done = run("--debug", "inspect", "smolm2")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-2].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "line", "hint"),
    [
        (PopError("it broke", "mend it"), "error: it broke", "mend it"),
        (
            OSError(28, "No space left on device", "/x/y"),
            "/x/y: No space left",
            "free up some disk space",
        ),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied", "permissions"),
        (MemoryError(), "not enough memory", "--ctx"),
        (ValueError("odd"), "unexpected ValueError: odd", "--debug"),
        (
            PopError("a [bold]name[/]\nin two lines", "x"),
            "error: a [bold]name[/] in two lines",
            "x",
        ),
    ],
)
def test_guard_reports_failures_in_two_lines(capsys, error, line, hint):
    with pytest.raises(typer.Exit) as leaving, error_output.guard(debug=False):
        raise error
    assert leaving.value.exit_code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert line in first
    assert second.startswith("hint: ")
    assert hint in second


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (StoppedError(), 130, "Stopped.\n"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_guard_exits_with_the_status(capsys, error, status, shown):
    with pytest.raises(typer.Exit) as leaving, error_output.guard(debug=False):
        raise error
    assert (leaving.value.exit_code, capsys.readouterr().err) == (status, shown)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
def test_sigterm_runs_cleanup(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom pop_local.ui.error_output import guard\n"
        "with guard(debug=False):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    finally: Path({str(tmp_path / 'cleaned')!r}).touch()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "")
    assert (tmp_path / "cleaned").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
def test_closed_output_pipe_is_no_error(tmp_path):
    model = make_gguf(tmp_path / "tiny.gguf", "llama")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pop_local", "inspect", str(model)],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pop-local c", ["chat", "convert", "compare", "config", "cache"]),
        ("pop-local cache c", ["clear"]),
    ],
)
def test_shell_completes_commands(tmp_path, words, expected):
    (tmp_path / "config.toml").write_text("broken")
    done = run(
        _POP_LOCAL_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
        POP_LOCAL_CONFIG=str(tmp_path / "config.toml"),
    )
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_shell_completion_is_installed(tmp_path):
    # Typer finds the shell among the parent processes, so one of them must be bash.
    line = f"{shlex.quote(sys.executable)} -m pop_local --install-completion; exit $?"
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", line], env=environment, check=True, timeout=60)
    assert "pop-local" in (tmp_path / ".bashrc").read_text()
    script = next((tmp_path / ".bash_completions").iterdir()).read_text()
    assert "_POP_LOCAL_COMPLETE=complete_bash" in script


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "m.gguf", "--max-kl", "inf"),
        ("convert", "m.gguf", "--memory", "1e300"),
        ("run", "m.gguf", "hi", "--top-p", "nan"),
    ],
)
def test_rejects_infinite_numbers(arguments):
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 2
    assert arguments[-2] in done.stderr


def test_checks_every_float_option():
    floats = [
        (f"{command} {name}", hint.__metadata__[0])
        for command in COMMANDS
        if inspect.isfunction(function := imported("pop_local.commands", command))
        for name, hint in get_type_hints(function, include_extras=True).items()
        if hasattr(hint, "__metadata__") and float in (hint.__origin__, *get_args(hint.__origin__))
    ]
    assert len(floats) > 6
    assert [name for name, option in floats if option.callback not in (finite, positive)] == []
