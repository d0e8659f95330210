"""A model of the catalog becomes a file to open: fetched, converted, and said so."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from converter.errors import OutputExistsError, PopError
from converter.format import read_pop_meta
from pop_local.calibration.options import FitOptions
from pop_local.engine.llama import backend
from pop_local.models import names as models
from pop_local.models.names import DEFAULT_MODEL, find
from pop_local.ui.watch import terminal_watch
from pop_local.workflows import open as opening
from pop_local.workflows.events import Watch
from pop_local.workflows.options import Hardware
from support.synthetic import make_gguf


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A models folder, and a catalog whose default model is a tiny one."""
    source = make_gguf(tmp_path / "tiny.gguf", "llama")
    folder = tmp_path / "store"
    folder.mkdir()
    entry = replace(find(DEFAULT_MODEL), file="tiny.gguf")

    def fetch(name: str, on_progress: object) -> Path:
        return Path(shutil.copy(source, folder / "tiny.gguf"))

    monkeypatch.setenv(models.MODELS_VARIABLE, str(folder))
    monkeypatch.setattr(models, "load_catalog", lambda: (entry,))
    monkeypatch.setattr(opening, "fetch", fetch)
    # Two threads on a busy machine wait for each other.
    monkeypatch.setattr(backend, "default_threads", lambda: 1)
    return folder


def model_file(model: str | None) -> Path:
    with terminal_watch() as watch:
        return opening.model_files(model, None, hardware=Hardware(), watch=watch).path


def at_depth(model: str) -> Path:
    with terminal_watch() as watch:
        return opening.files_at_depth(model, None, hardware=Hardware(), watch=watch).path


@pytest.mark.slow
def test_it_is_fitted(store, capsys, monkeypatch):
    assert FitOptions() == opening._FIT
    monkeypatch.setattr(opening, "_FIT", FitOptions(tokens=2048))
    meta = read_pop_meta(model_file(None))
    assert meta is not None
    assert (meta.projection, meta.boundary) == ("fitted", 5)
    assert meta.measured is not None and meta.measured.ppl_full > 1
    assert "Fitting takes" in capsys.readouterr().err


def test_the_conversion_takes_threads_and_gpu_layers(store, monkeypatch):
    taken = []
    monkeypatch.setattr(opening, "convert", lambda *_, **how: taken.append(how["hardware"]))
    opening.model_files(None, None, hardware=Hardware(3, 0), watch=Watch())
    assert taken == [Hardware(3, 0)]


def test_another_process_may_be_faster(store, monkeypatch):
    def beaten(path: Path, target: Path, **_: object) -> None:
        target.write_bytes(b"theirs")
        raise OutputExistsError(f"{target} appeared meanwhile", "")

    monkeypatch.setattr(opening, "convert", beaten)
    assert model_file(None).read_bytes() == b"theirs"


@pytest.fixture
def unfitted(store, monkeypatch) -> Path:
    """The fit takes seconds."""
    monkeypatch.setattr(opening, "_FIT", None)
    return store


@pytest.mark.parametrize("name", [None, "smollm2"])
def test_first_time_it_is_fetched_and_converted(unfitted, capsys, name):
    store = unfitted
    path = model_file(name)
    assert path == store / "tiny.pop.gguf"
    meta = read_pop_meta(path)
    assert meta is not None
    assert meta.boundary == 5
    said = capsys.readouterr()
    assert said.out == ""
    fetching, converting, measuring, *outside = said.err.splitlines()
    assert fetching.startswith(f"Fetching {DEFAULT_MODEL} (92.9 MB) into ")
    assert "licence Apache-2.0" in fetching
    assert converting.startswith(f"Converting it to {path}")
    assert measuring == "Measuring what own projections lose on held-out text"
    assert all(line.startswith("Warning: ") for line in outside)


def test_second_time_nothing_is_done_nor_said(unfitted, capsys):
    first = model_file(None)
    capsys.readouterr()
    before = first.stat().st_mtime_ns
    assert model_file(None) == first
    assert first.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


def test_a_fetched_model_is_only_converted(unfitted, capsys, tmp_path):
    shutil.copy(tmp_path / "tiny.gguf", unfitted / "tiny.gguf")
    model_file(None)
    assert "Fetching" not in capsys.readouterr().err


def test_the_unconverted_file_of_a_name(store, tmp_path):
    assert at_depth("smollm2") == store / "tiny.gguf"
    assert at_depth(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"


def test_a_path_is_taken_as_it_is(store, tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    assert model_file(str(path)) == path
    assert capsys.readouterr().err == ""


def test_unknown_names_and_paths_are_refused(store):
    for model in ("nonsense", "no/such/file.gguf"):
        with pytest.raises(PopError, match="there is no"):
            model_file(model)
