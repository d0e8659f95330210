"""Test settings from the file and the environment, and their effect on commands."""

import json
import os
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pop_base.errors import PopError
from pop_local.cli import app
from pop_local.config import settings
from pop_local.config.settings import SettingValue, config_path, given, load
from pop_local.models.model_names import models_dir
from pop_local.ui.lazy import Listed, lazy_group


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "etc" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setenv("POP_LOCAL_CONFIG", str(path))
    monkeypatch.delenv("POP_LOCAL_STATE_DIR")
    return path


def pop_local(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def value(key: str) -> SettingValue:
    return next(value for value in load() if value.key == key)


def test_defaults_without_settings(file):
    assert given() == {}
    assert value("threads") == SettingValue("threads", None, "default", "")


def test_environment_overrides_the_file(file, monkeypatch):
    file.write_text('threads = 4\ntemperature = 1\nsystem = "Be brief."\n')
    monkeypatch.setenv("POP_LOCAL_THREADS", "8")
    monkeypatch.setenv("POP_LOCAL_TOP_P", "0.5")
    monkeypatch.setenv("POP_LOCAL_SYSTEM", "")
    assert given() == {"threads": 8, "temperature": 1.0, "top_p": 0.5, "system": "Be brief."}
    assert value("threads") == SettingValue("threads", 8, "environment", "POP_LOCAL_THREADS")
    assert value("system") == SettingValue("system", "Be brief.", "file", str(file))


def test_variable_selects_the_file(monkeypatch):
    monkeypatch.delenv("POP_LOCAL_CONFIG")
    assert config_path().parts[-2:] == ("pop-local", "config.toml")
    monkeypatch.setenv("POP_LOCAL_CONFIG", "~/mine.toml")
    assert config_path() == Path.home() / "mine.toml"


def test_models_dir_is_relative_to_the_file(file, tmp_path, monkeypatch):
    file.write_text('models_dir = "../gguf"\n')
    assert models_dir().resolve() == tmp_path / "gguf"
    file.write_text('models_dir = "~/gguf"\n')
    assert models_dir() == Path.home() / "gguf"
    monkeypatch.setenv("POP_LOCAL_MODELS_DIR", str(tmp_path))
    assert models_dir() == tmp_path


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("thread = 4", "there is no setting named 'thread'", "did you mean threads?"),
        ("[chat]\nthreads = 4", "there is no setting named 'chat'", "known: models_dir"),
        ("ctx = 'big'", "ctx: 'big' is not a whole number from 1", "correct"),
        ("threads = 0", "threads: 0 is not a whole number from 1 to 512", "correct"),
        ("threads = true", "threads: True is not a whole number from 1", "correct"),
        ("threads = 1.5", "threads: 1.5 is not a whole number from 1", "correct"),
        ("top_p = 1.5", "top_p: 1.5 is not a number from 0 to 1", "correct"),
        ("temperature = nan", "temperature: nan is not a number from 0 to 10", "correct"),
        ("temperature = inf", "temperature: inf is not a number from 0 to 10", "correct"),
        (f"temperature = {10**400}", "is not a number from 0 to 10", "correct"),
        ("system = 3", "system: 3 is not text", "correct"),
        ("system = ['a']", "system: ['a'] is not text", "correct"),
        ('models_dir = "~\\u0000/x"', "the path contains a NUL", "correct the path"),
        ("state_dir = '~nobody-at-all/x'", "no home folder was found for", "absolute path"),
        ("ctx = 1\nthreads = = 4", "Unexpected character", "threads = 4"),
    ],
)
def test_reports_invalid_file(file, text, message, hint):
    file.write_text(text)
    done = pop_local("config")
    assert (done.exit_code, done.stdout) == (1, "")
    error, advice = done.stderr.splitlines()
    assert message in error
    assert hint in advice


def test_reports_unreadable_file(file):
    file.write_bytes(b"system = '\xff'")
    with pytest.raises(PopError, match=r"cannot read the settings file .*config\.toml: 'utf-8'"):
        load()
    file.unlink()
    file.mkdir()
    with pytest.raises(PopError, match="cannot read the settings file"):
        load()


def test_null_device_means_no_settings(monkeypatch):
    monkeypatch.setenv("POP_LOCAL_CONFIG", os.devnull)
    monkeypatch.delenv("POP_LOCAL_STATE_DIR")
    assert given() == {}


def test_accepts_byte_order_mark(file):
    """Windows' editor writes a byte order mark."""
    file.write_text("threads = 4", encoding="utf-8-sig")
    assert given() == {"threads": 4}


def test_rejects_file_of_unknown_user(monkeypatch):
    monkeypatch.setenv("POP_LOCAL_CONFIG", "~nobody-at-all/config.toml")
    with pytest.raises(PopError, match=r"no home folder was found for ~nobody-at-all"):
        load()


@pytest.mark.parametrize("text", ["many", "0", "1.5", "nan", "9" * 400])
def test_reports_invalid_variable(file, monkeypatch, text):
    monkeypatch.setenv("POP_LOCAL_THREADS", text)
    with pytest.raises(PopError, match=r"POP_LOCAL_THREADS: .* is not a whole number from 1"):
        load()


MODULE = """
import json, typer
from typing import Annotated, Optional

def probe(
    model: Optional[str] = typer.Argument(None),
    threads: Optional[int] = typer.Option(None, min=1),
    gpu_layers: int = typer.Option(-1),
    seed: Optional[int] = None,
) -> None:
    print(json.dumps([model, threads, gpu_layers, seed]))

def must(model: str) -> None:
    print(model)

def bare() -> None:
    print("bare")
"""


@pytest.fixture
def probe(tmp_path, monkeypatch) -> typer.Typer:
    folder = tmp_path / "probe_commands"
    folder.mkdir()
    commands = dict.fromkeys(("probe", "must", "bare"), Listed("Use", "", ""))
    for name in commands:
        (folder / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    program = typer.Typer(cls=lazy_group("probe_commands", commands))
    program.callback()(lambda debug=False: None)
    return program


def test_settings_become_command_defaults(file, probe, monkeypatch):
    def printed(*arguments: str) -> object:
        return json.loads(CliRunner().invoke(probe, ["probe", *arguments]).stdout)

    assert printed() == [None, None, -1, None]
    file.write_text('model = "mine"\nthreads = 4\ngpu_layers = 0\nctx = 5\n')
    assert printed() == ["mine", 4, 0, None]
    monkeypatch.setenv("POP_LOCAL_THREADS", "5")
    assert printed() == ["mine", 5, 0, None]
    assert printed("other", "--threads", "6", "--gpu-layers", "7") == ["other", 6, 7, None]


def test_settings_do_not_replace_required_arguments(file, probe):
    file.write_text('model = "mine"\n')
    assert CliRunner().invoke(probe, ["must"]).exit_code == 2


def test_help_works_with_an_invalid_file(file, probe):
    file.write_text("nonsense")
    runner = CliRunner()
    assert runner.invoke(probe, ["probe", "--help"]).exit_code == 0
    assert runner.invoke(probe, ["bare"]).stdout == "bare\n"
    done = runner.invoke(probe, ["probe"])
    assert done.exit_code == 1
    assert f"cannot read the settings file {file}" in done.stderr


def test_chat_has_a_parameter_for_each_setting():
    from pop_local.commands import chat

    names = set(chat.chat.__annotations__)
    assert set(settings.KEYS) - {"models_dir", "state_dir"} <= names


def test_config_shows_values_and_sources(file, monkeypatch):
    file.write_text("threads = 4\n")
    monkeypatch.setenv("POP_LOCAL_CTX", "2048")
    monkeypatch.setenv("POP_LOCAL_CTXX", "1")
    done = pop_local("config")
    assert done.exit_code == 0
    cells = [re.split(" {2,}", line) for line in done.stdout.splitlines()]
    shown = {row[0]: row[1:3] for row in cells[2:]}
    assert list(shown) == list(settings.KEYS)
    assert shown["threads"] == ["4", "file"]
    assert shown["ctx"] == ["2048", "environment"]
    assert shown["model"] == ["the best catalog model that fits in free memory", "default"]
    assert shown["top_p"][1] == "default"
    assert "POP_LOCAL_CTXX does not match any setting" in done.stderr
    assert str(file) in done.stderr


def test_config_prints_json(file, monkeypatch):
    file.write_text("threads = 4\n")
    monkeypatch.setenv("POP_LOCAL_CTX", "2048")
    report = json.loads(pop_local("config", "--json").stdout)
    assert report["file"] == str(file)
    by_key = {entry.pop("key"): entry for entry in report["settings"]}
    assert by_key["threads"] == {"value": 4, "origin": "file", "where": str(file)}
    assert by_key["ctx"] == {"value": 2048, "origin": "environment", "where": "POP_LOCAL_CTX"}
    assert by_key["system"] == {"value": None, "origin": "default", "where": ""}


def test_doctor_reports_invalid_file(file):
    file.write_text("nonsense")
    done = pop_local("doctor", "--json")
    checks = {check["key"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.exit_code == 1
    assert str(file) in checks["settings"]["found"]


@pytest.mark.parametrize("exists", [False, True])
def test_doctor_checks_configured_model(file, tmp_path, exists):
    model = tmp_path / "mine.gguf"
    file.write_text(f'model = "{model}"\n')
    if exists:
        model.touch()
    checks = json.loads(pop_local("doctor", "--json").stdout)["checks"]
    [check] = [check for check in checks if check["key"] == "model"]
    assert check["status"] == ("ok" if exists else "fix")
    assert str(model) in check["found"]
