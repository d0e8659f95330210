"""Test opening catalog models: download, shipped sidecar, and the notes about both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from typer.testing import CliRunner

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.gguf.header import read_header
from pop_converter.popfile.format import read_binding
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from pop_converter.popfile.sidecar import sidecar_meta, write_sidecar
from pop_local.cli import app
from pop_local.commands.opening import default_model
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.models import model_names as models
from pop_local.models import sidecars
from pop_local.models.model_files import ModelFiles, stock
from pop_local.models.model_names import DEFAULT_MODEL, find
from pop_local.ui.watch import terminal_watch
from pop_local.workflows import open as opening
from support.converted import paired, tiny
from support.program import called
from support.shapes import read_shape
from support.synthetic import make_gguf


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """Create a models folder, and a catalog whose default model is tiny."""
    source = make_gguf(tmp_path / "tiny.gguf", "llama")
    folder = tmp_path / "store"
    folder.mkdir()
    entry = replace(find(DEFAULT_MODEL), file="tiny.gguf")

    def fetch(name: str, *_: object, **__: object) -> Path:
        return Path(shutil.copy(source, folder / "tiny.gguf"))

    monkeypatch.setenv(models.MODELS_VARIABLE, str(folder))
    monkeypatch.setattr(models, "load_catalog", lambda: (entry,))
    monkeypatch.setattr("pop_local.workflows.pull.fetch", fetch)
    return folder


def files(model: str) -> ModelFiles:
    with terminal_watch() as watch:
        return opening.model_files(model, None, watch)


def base(model: str) -> Path:
    with terminal_watch() as watch:
        return opening.base_file(model, watch)


@pytest.fixture
def shipped(store, tmp_path, monkeypatch) -> Path:
    """Write a sidecar of the tiny model, as if pop-local shipped it."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    made = paired(tmp_path / "tiny.gguf", folder, "own", boundary=5)
    made.single.unlink()
    monkeypatch.setattr(sidecars, "SHIPPED", folder)
    return made.sidecar.rename(folder / "any-name.pop-sidecar.gguf")


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "smollm2"])
def test_first_use_fetches_model_and_opens_shipped_sidecar(store, shipped, capsys, name):
    assert files(name) == ModelFiles(store / "tiny.gguf", shipped)
    said = capsys.readouterr()
    assert said.out == ""
    fetching, pruning = "".join(said.err).splitlines()
    sizes = "92.9 MB compressed, 98.4 MB on disk"
    assert fetching.startswith(f"Fetching {DEFAULT_MODEL} ({sizes}) into ")
    assert "license: Apache-2.0" in fetching
    assert pruning == f"Sidecar: {shipped.name} (shipped with pop-local)."
    assert files(name) == ModelFiles(store / "tiny.gguf", shipped)
    assert "Fetching" not in capsys.readouterr().err


def test_name_refers_to_the_converted_copy(store, tmp_path, monkeypatch):
    base = Path(shutil.copy(tmp_path / "tiny.gguf", store / "tiny.gguf"))
    plan = make_plan(read_shape(base), boundary=5)
    monkeypatch.setattr(sidecars, "SHIPPED", tmp_path)
    write_sidecar(plan, base, tmp_path / "any.pop-sidecar.gguf")
    sidecars._bindings.cache_clear()
    copy = store / "tiny.pop.gguf"
    convert(plan, base, copy)
    assert files("smollm2") == files(str(copy)) == ModelFiles(copy)
    assert models.resolve("smollm2") == copy
    assert models.resolve("smollm2", base=True) == base


@pytest.mark.parametrize(
    ("free_gb", "best"),
    [(1.9, DEFAULT_MODEL), (2, "qwen-0.5b"), (3.9, "qwen-0.5b"), (4, "qwen-1.5b")],
)
def test_default_model_depends_on_free_memory(monkeypatch, free_gb, best):
    def open_model(options: EngineOptions, *_: object) -> None:
        raise PopError(f"it would be {options.model}")

    monkeypatch.setattr("pop_local.commands.opening.open_model", open_model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Mock(available=free_gb * 10**9))
    for command in ("chat", "serve"):
        assert f"it would be {find(best).name}" in called(command).stderr
    for question in ("Who are you?", "a " * 10_000):
        assert f"it would be {find(best).name}" in called("run", question).stderr
    monkeypatch.setenv("POP_LOCAL_MODEL", "gemma3")
    assert "it would be gemma3" in called("chat").stderr
    assert "it would be gemma3" in called("run", "Who are you?").stderr
    assert "it would be my model.gguf" in called("run", "my model.gguf", "Who are you?").stderr


@pytest.mark.parametrize(
    ("free_gb", "how", "n"),
    [
        (7.9, {}, 1),
        (8, {}, 2),
        (8, {"n_parallel": 1}, 1),
        (7.9, {"n_parallel": 3}, 3),
    ],
)
def test_number_of_parallel_answers_depends_on_memory(tmp_path, monkeypatch, free_gb, how, n):
    monkeypatch.setattr(opening, "free_bytes", lambda: free_gb * 10**9)
    wanted: dict[str, Any] = {"n_ctx": 256, "n_parallel": None, "n_threads": 1}
    options = EngineOptions.of(tiny(tmp_path), **(wanted | how))
    with opening.open_model(options, Watch()) as model:
        assert len(model.engine.sequences) == n


def test_asks_before_large_download(store, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Mock(available=0))
    monkeypatch.setattr("sys.stdin", Mock(isatty=lambda: True))
    asked = Mock(return_value=False)
    monkeypatch.setattr("typer.confirm", asked)
    for name in (default_model(), "smollm2"):
        with pytest.raises(PopError, match="no model was fetched"):
            files(name)
        assert asked.call_args.args == (f"Fetch {DEFAULT_MODEL} (92.9 MB)?",)
    asked.return_value = True
    assert files("smollm2").path == store / "tiny.gguf"
    files("smollm2")
    assert asked.call_count == 3


def test_renamed_copy_is_recognized_by_hash(shipped, tmp_path):
    copy, other = tmp_path / "copy.gguf", tmp_path / "other.gguf"
    shutil.copy(tmp_path / "tiny.gguf", copy)
    assert files(str(copy)) == ModelFiles(copy, shipped)
    assert PopModel.open(copy, n_ctx=64, n_threads=1).engine.sequences[0].settings.boundary == 5
    [listed] = [stored for stored in stock(tmp_path) if stored.name == "copy"]
    assert (listed.boundary, listed.sidecar) == (5, None)
    content = bytearray(copy.read_bytes())
    content[content.index(b"attn_q")] ^= 1
    other.write_bytes(content)
    assert files(str(other)) == ModelFiles(other)


def test_convert_mentions_shipped_sidecar(shipped, tmp_path):
    given = ["convert", str(tmp_path / "tiny.gguf"), "--dry-run", "--json"]
    planned = CliRunner().invoke(app, given)
    assert planned.exit_code == 0 and json.loads(planned.stdout)
    assert f"pop-local ships the sidecar {shipped.name}" in " ".join(planned.stderr.split())


def test_prefers_sidecar_next_to_model(shipped, tmp_path):
    base = tmp_path / "tiny.gguf"
    own = Path(shutil.copy(shipped, tmp_path / "tiny.pop-sidecar.gguf"))
    assert files(str(base)) == ModelFiles(base, own)


def test_every_catalog_model_has_a_shipped_sidecar():
    found = {}
    for path in sidecars.SHIPPED.glob("*.gguf"):
        header = read_header(path)
        meta = sidecar_meta(header)
        assert meta.measured is not None and meta.budget is not None
        assert meta.measured.lookups_n
        found[meta.source_sha256] = read_binding(header).base_bytes
    assert found == {entry.sha256: entry.size_bytes for entry in models.load_catalog()}


def test_finds_unconverted_file_by_name(store, tmp_path):
    path = tmp_path / "tiny.gguf"
    assert base("smollm2") == store / "tiny.gguf"
    assert base(str(path)) == path
    assert files(str(path)) == ModelFiles(path)


def test_stored_models_take_precedence_over_catalog(store, capsys):
    own = make_gguf(store / "smollm2.gguf", "llama", n_layer=4)
    assert files("smollm2") == ModelFiles(own)
    assert base("smollm2") == own
    assert capsys.readouterr().err == ""


def test_folder_does_not_hide_catalog_name(store, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert files("smollm2") == ModelFiles(store / "tiny.gguf", shipped)


def test_rejects_unknown_names_and_paths(store):
    for model in ("nonsense", "no/such/file.gguf"):
        with pytest.raises(PopError, match=r"no model named|does not exist"):
            files(model)
