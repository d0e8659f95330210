"""Test `convert --sidecar`, and the commands that open a model with its sidecar."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pop_base.errors import PopError
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.sidecar import write_sidecar
from pop_local.cli import app
from pop_local.models import model_names as models
from pop_local.models.model_files import ModelFiles
from pop_local.models.model_names import DEFAULT_MODEL, find
from pop_local.ui.watch import terminal_watch
from pop_local.workflows import open as opening
from support.converted import Pair, names, paired
from support.shapes import read_shape
from support.synthetic import make_gguf, make_split

pytestmark = pytest.mark.slow


def model_files(model: str, sidecar: Path | None = None) -> ModelFiles:
    with terminal_watch() as watch:
        return opening.model_files(model, sidecar, watch)


def command(*arguments: object, text: str = "") -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=text)


def convert(*arguments: object) -> Result:
    """Run `convert --sidecar` with own projections; test_convert_fit.py tests fits."""
    depth = () if "--boundary" in arguments else ("--boundary", 5)
    return command("convert", "--sidecar", "--projection", "own", *depth, *arguments)


@pytest.fixture
def base(tmp_path) -> Path:
    return make_gguf(tmp_path / "tiny.gguf", "llama", chat_template="{{ messages[0].content }}")


@pytest.fixture
def sidecar(base) -> Path:
    path = base.with_name("tiny.pop-sidecar.gguf")
    write_sidecar(make_plan(read_shape(base), boundary=4), base, path)
    return path


@pytest.fixture
def fitted(tmp_path) -> Pair:
    return paired(make_gguf(tmp_path / "tiny.gguf", "llama"), tmp_path, "fitted", boundary=4)


# --- convert


def test_convert_writes_sidecar_next_to_unchanged_model(base):
    before = base.read_bytes()
    done = convert(base, "--boundary", 4, "--json")
    report = json.loads(done.stdout)
    written = base.with_name("tiny.pop-sidecar.gguf")
    assert (report["output"], report["form"], report["boundary"]) == (str(written), "sidecar", 4)
    assert report["source_sha256"] == hashlib.sha256(before).hexdigest()
    assert names(base.parent) == {base.name, written.name}
    assert base.read_bytes() == before
    assert written.stat().st_size < 2048


def test_explains_sidecar_option_for_other_path(base, tmp_path):
    done = convert(base, tmp_path / "other.gguf")
    assert done.exit_code == 0
    assert f"pass it with --sidecar {tmp_path / 'other.gguf'}" in " ".join(done.stderr.split())
    assert "--sidecar" not in convert(base).stderr


def test_split_model_gets_one_sidecar(tmp_path):
    parts = make_split(tmp_path / "model.gguf", "llama", max_tensors=30)
    assert convert(parts[0]).exit_code == 0
    written = tmp_path / "model.pop-sidecar.gguf"
    assert model_files(str(parts[0])) == ModelFiles(parts[0], written)


# --- finding it


def test_opens_and_reports_sidecar_next_to_model(base, sidecar, capsys):
    assert model_files(str(base)) == ModelFiles(base, sidecar)
    said = capsys.readouterr()
    assert said.out == ""
    assert f"Sidecar: {sidecar}." in said.err.replace("\n", "")


def test_sidecar_option_selects_file(base, sidecar, capsys):
    elsewhere = sidecar.rename(base.with_name("other.gguf"))
    assert model_files(str(base)) == ModelFiles(base)
    assert model_files(str(base), elsewhere) == ModelFiles(base, elsewhere)
    assert capsys.readouterr().err == ""
    with pytest.raises(PopError, match="does not exist"):
        model_files(str(base), sidecar)


def test_converted_model_ignores_sidecar(fitted):
    shutil.copy(fitted.sidecar, fitted.single.with_name("single.pop-sidecar.gguf"))
    assert model_files(str(fitted.single)) == ModelFiles(fitted.single)


def test_catalog_name_opens_base_and_sidecar(base, sidecar, monkeypatch, tmp_path):
    """Open the base and its sidecar by the catalog name, even if a converted copy exists."""
    entry = replace(find(DEFAULT_MODEL), file=base.name)
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(models, "load_catalog", lambda: (entry,))
    assert model_files(DEFAULT_MODEL) == ModelFiles(base, sidecar)
    assert command("convert", "--projection", "own", "--boundary", 4, base).exit_code == 0
    copy = tmp_path / "tiny.pop.gguf"
    assert model_files(DEFAULT_MODEL) == ModelFiles(copy)
    assert model_files(DEFAULT_MODEL, sidecar) == ModelFiles(base, sidecar)


# --- the commands


def test_run_uses_sidecar(base, sidecar):
    arguments = ("run", base, "word " * 40, "--json", "--max-tokens", 2, "--threads", 1)
    report = json.loads(command(*arguments).stdout)
    assert (report["boundary"], report["full"]) == (4, False)
    assert report["stats"]["n_pruned"] > 0
    done = command(*arguments, "--full")
    assert "Sidecar:" not in done.stderr
    report = json.loads(done.stdout)
    assert report["stats"]["n_pruned"] == 0
    elsewhere = sidecar.rename(base.with_name("other.gguf"))
    assert json.loads(command(*arguments).stdout)["boundary"] == 0
    assert json.loads(command(*arguments, "--sidecar", elsewhere).stdout)["boundary"] == 4


def test_full_mode_ignores_stale_sidecar(base, sidecar):
    make_gguf(base, "llama", chat_template="{{ messages[-1].content }}!")
    ask = ("run", base, "hi", "--max-tokens", 2, "--threads", 1)
    assert command(*ask).exit_code == 1
    done = command(*ask, "--full")
    assert done.exit_code == 0, done.stderr
    assert " bytes), not for " in " ".join(done.stderr.split())
    assert command(*ask, "--full", "--sidecar", sidecar).exit_code == 1


def test_eval_measures_sidecar(fitted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc wow def " * 200)
    windows = ("--text", text, "--windows", 2, "--context", 64, "--continuation", 8)
    arguments = ("eval", fitted.base, *windows, "--lookups", 0, "--json", "--threads", 1)
    report = json.loads(command(*arguments).stdout)
    assert (report["projection"], report["boundary"]) == ("fitted", 4)
    alone = command("eval", fitted.single, *arguments[2:])
    assert report["kl_mean"] == json.loads(alone.stdout)["kl_mean"]


def test_inspect_shows_sidecar(base, sidecar):
    report = json.loads(command("inspect", base, "--json").stdout)
    assert report["sidecar"] == str(sidecar)
    assert report["boundary"] == 4
    assert report["opens_in_stock_llama_cpp"]
    lines = command("inspect", base).stdout.splitlines()
    assert any(line.startswith("Sidecar") and str(sidecar) in line for line in lines)
    assert any(line.endswith("opens this file") for line in lines)
