"""Test `pop-local list` and `pop-local rm` on a folder of tiny models."""

import json
import os
import re
import sys
import threading
from pathlib import Path

import pexpect
import pytest
from typer.testing import CliRunner, Result

from pop_base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import sidecar_path
from pop_local.cli import app
from pop_local.models import model_names as models
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.model_files import (
    StoredModel,
    known_name,
    models_by_name,
    parts_folder,
    stock,
)
from pop_local.models.model_names import resolve
from support.converted import converted, paired
from support.synthetic import make_gguf, make_split
from support.vision_models import MMPROJS, make_mmproj


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Path:
    """Create a folder with a model, its converted copy, a split model and three unusable files."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv(models.MODELS_VARIABLE, str(folder))
    monkeypatch.chdir(tmp_path)
    converted(make_gguf(folder / "Tiny.Q8_0.gguf", "llama"), folder, boundary=6)
    make_split(folder / "parted.gguf", "qwen2", max_tensors=40)
    (folder / "cut.gguf").write_bytes((folder / "Tiny.Q8_0.gguf").read_bytes()[:50_000])
    (folder / "page.gguf").write_text("<html>")
    (folder / "new.gguf.partial").write_bytes(b"GGUF")
    (folder / "notes.txt").touch()
    return folder


def sidecar(store: Path) -> Path:
    """Write a sidecar of Tiny.Q8_0, with fitted projections."""
    base = store / "Tiny.Q8_0.gguf"
    made = paired(base, store.parent, "fitted", boundary=5)
    return made.sidecar.rename(sidecar_path(read_source(base)))


def the(name: str, store: Path) -> StoredModel:
    return next(model for model in stock(store) if model.name == name)


def pop_local(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def rows(output: str) -> list[list[str]]:
    """Split a table's lines into cells, without the line below the titles and empty cells."""
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines() if "──" not in line]


def test_lists_damaged_files(store):
    done = pop_local("list")
    assert done.exit_code == 0
    head, *body = rows(done.stdout)
    assert head == ["Model", "Size", "Fast reading", "Problem"]
    cells = {row[0]: row[2:] for row in body if row[-1] != "not downloaded"}
    usable = {name: cells.pop(name) for name in ("parted", "Tiny.Q8_0", "Tiny.Q8_0.pop")}
    assert usable == {"parted": [], "Tiny.Q8_0": [], "Tiny.Q8_0.pop": ["yes"]}
    problems = {name: problem for name, (problem,) in cells.items()}
    assert list(problems) == ["cut", "new.gguf.partial", "page"]
    assert problems["cut"].startswith("is truncated")
    assert "download is incomplete" in problems["new.gguf.partial"]
    assert "not a GGUF file" in problems["page"]
    assert str(store) in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_reports_named_pipe_without_reading_it(store):
    path = store / "pipe.gguf"
    os.mkfifo(path)
    # Reading the pipe must not block.
    writer = threading.Thread(target=lambda: path.open("wb").close())
    writer.start()
    problem = the("pipe", store).problem
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)
    assert problem == "is a pipe or a device, not a file"


def test_lists_catalog_models_not_downloaded(store):
    (store / models.find("gemma3").file).touch()
    absent = ["smollm2", "qwen-0.5b", "qwen-1.5b"]
    table = rows(pop_local("list").stdout)
    body = [row for row in table if "not downloaded" in row]
    assert [row[0] for row in body] == absent
    assert body[0][-2:] == ["98.4 MB", "not downloaded"]
    assert "gemma-3-270m.Q4_K_M" in [row[0] for row in table]
    report = json.loads(pop_local("list", "--json").stdout)["not_fetched"]
    assert [model["name"] for model in report] == absent
    assert report[0]["size_bytes"] == models.find("smollm2").size_bytes


def test_shows_folder_of_models_with_equal_names(tmp_path, monkeypatch):
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        make_gguf(folder / "same.gguf", "llama")
    monkeypatch.setattr("pop_local.commands.list.models_dirs", lambda: folders)
    head, *body = rows(pop_local("list").stdout)
    assert head[1] == "Folder"
    assert [row[1] for row in body[:2]] == [str(folder) for folder in folders]


def test_clone_lists_and_removes_users_models(store, monkeypatch):
    for part in models._CLONE:
        (store.parent / part).mkdir(parents=True)
    users = store.rename(store.parent / "models" / "models")
    monkeypatch.delenv(models.MODELS_VARIABLE)
    monkeypatch.setattr(models.platformdirs, "user_data_path", lambda name: users.parent)
    assert "Tiny.Q8_0" in pop_local("list").stdout
    assert pop_local("rm", "--yes", "Tiny.Q8_0").exit_code == 0
    assert not (users / "Tiny.Q8_0.gguf").exists()
    assert (
        "models contains no model named 'Tiny.Q8_0'" in pop_local("rm", "--yes", "Tiny.Q8_0").stderr
    )


def test_json_contains_files_and_sizes(store):
    report = json.loads(pop_local("list", "--json").stdout)
    assert report["folder"] == str(store)
    by_name = {model["name"]: model for model in report["models"]}
    parts = sorted(map(str, store.glob("parted-*.gguf")))
    assert len(parts) > 1
    assert by_name["parted"]["files"] == parts
    assert by_name["parted"]["size_bytes"] == sum(Path(part).stat().st_size for part in parts)
    assert by_name["Tiny.Q8_0.pop"]["boundary"] == 6
    assert by_name["cut"]["architecture"] is None
    assert by_name["cut"]["problem"]


def test_sidecar_belongs_to_its_model(store):
    path = sidecar(store)
    model = the("Tiny.Q8_0", store)
    assert model.sidecar == path
    assert (model.boundary, model.projection, model.problem) == (5, "fitted", "")
    assert model.size_bytes == (store / "Tiny.Q8_0.gguf").stat().st_size + path.stat().st_size
    assert path.name in pop_local("list", "--json").stdout
    assert path.name.removesuffix(".gguf") not in models_by_name(store)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_reports_mismatched_sidecar(store, damage):
    path = sidecar(store)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        make_gguf(store / "Tiny.Q8_0.gguf", "llama", n_layer=9)
    model = the("Tiny.Q8_0", store)
    assert model.architecture == "llama"
    assert ("truncated" if damage == "cut" else "was created for") in model.problem


def test_reports_sidecar_without_model(store):
    sidecar(store)
    (store / "Tiny.Q8_0.gguf").unlink()
    assert "model is missing" in the("Tiny.Q8_0.pop-sidecar", store).problem


def test_reports_missing_parts_of_split_model(store):
    missing = sorted(store.glob("parted-*.gguf"))[1]
    missing.unlink()
    assert missing.name in the("parted", store).problem


@pytest.mark.parametrize("exists", [False, True])
def test_empty_folder_suggests_a_command(tmp_path, monkeypatch, exists):
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path / "none"))
    if exists:
        (tmp_path / "none").mkdir()
    done = pop_local("list")
    assert done.exit_code == 0
    assert {row[-1] for row in rows(done.stdout)[1:]} == {"not downloaded"}
    assert "pop-local pull" in done.stderr
    assert json.loads(pop_local("list", "--json").stdout)["models"] == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Tiny.Q8_0", "Tiny.Q8_0.gguf"),
        ("tiny.q8_0.pop", "Tiny.Q8_0.pop.gguf"),
        ("Tiny.Q8_0.gguf", "Tiny.Q8_0.gguf"),
    ],
)
def test_commands_accept_listed_names(store, name, file):
    assert resolve(name) == store / file
    done = pop_local("inspect", name, "--json")
    assert json.loads(done.stdout)["file"] == str(store / file)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Tiny.Q8", "Tiny.Q8_0"),
        ("partet", "parted"),
        ("Tiny.Q8_1.gguf", "Tiny.Q8_0 or Tiny.Q8_0.pop"),
        ("smolm2", "smollm2"),
        ("qwen9-7b", "qwen3-1.7b, qwen2.5-7b or qwen3-8b"),
    ],
)
def test_suggests_nearest_name(store, name, nearest):
    with pytest.raises(PopError, match=name) as failure:
        resolve(name)
    assert f"did you mean {nearest}?" in failure.value.hint


def test_rm_removes_model_and_reports_freed_space(store):
    before = set(store.iterdir())
    freed = (store / "Tiny.Q8_0.gguf").stat().st_size
    done = pop_local("rm", "tiny.q8_0", "--yes", "--json")
    assert json.loads(done.stdout) == {
        "files": [str(store / "Tiny.Q8_0.gguf")],
        "freed_bytes": freed,
    }
    assert before - set(store.iterdir()) == {store / "Tiny.Q8_0.gguf"}


def test_rm_removes_parts_sidecars_and_partial_downloads(store):
    sidecar(store)
    done = pop_local("rm", "parted", "Tiny.Q8_0", "new.gguf.partial", "tiny.q8_0", "--yes")
    assert done.exit_code == 0
    left = ["Tiny.Q8_0.pop.gguf", "cut.gguf", "notes.txt", "page.gguf"]
    assert sorted(file.name for file in store.iterdir()) == left
    assert done.stdout.splitlines()[-1].startswith("Freed ")


def test_rm_accepts_catalog_name(store):
    entry = models.find("gemma-3-270m")
    for file in (entry.file, entry.pop_file):
        make_gguf(store / file, "gemma3")
    done = pop_local("rm", "gemma-3-270m", "--yes", "--json")
    assert json.loads(done.stdout)["files"] == [
        str(store / entry.file),
        str(store / entry.pop_file),
    ]
    assert not (store / entry.file).exists()
    assert (
        "contains no model named 'gemma-3-270m'" in pop_local("rm", "gemma-3-270m", "--yes").stderr
    )


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-270m.Q4_K_M.gguf.parts"])
def test_lists_and_removes_catalog_parts(store, name):
    parts = parts_folder(store / models.find("gemma-3-270m").file)
    (parts / "pip-x").mkdir(parents=True)
    (parts / "one.whl").write_bytes(bytes(700))
    (parts / "pip-x" / "two.whl").write_bytes(bytes(77))
    shown = the("gemma-3-270m.Q4_K_M.gguf.parts", store)
    assert (shown.size_bytes, shown.problem) == (
        777,
        "the download is incomplete: pull the model again",
    )
    done = pop_local("rm", name, "--yes", "--json")
    assert json.loads(done.stdout) == {"files": [str(parts)], "freed_bytes": 777}
    assert not parts.exists()


def test_rm_prefers_stored_name_to_catalog_name(store):
    entry = models.find("gemma-3-270m")
    own, fetched = store / "gemma-3-270m.gguf", store / entry.file
    for path in (own, fetched):
        make_gguf(path, "gemma3")
    assert pop_local("rm", "gemma-3-270m", "--yes").exit_code == 0
    assert (own.exists(), fetched.exists()) == (False, True)


def test_rm_removes_mmproj_with_models_name(store):
    named, other = store / "mmproj-Tiny.Q8_0.gguf", store / "mmproj-Other.gguf"
    for path in (named, other):
        make_mmproj(path, MMPROJS["llama"])
    assert pop_local("rm", "Tiny.Q8_0", "--yes").exit_code == 0
    assert named.exists()  # for its converted copy, too
    done = pop_local("rm", "Tiny.Q8_0.pop", "--yes", "--json")
    assert json.loads(done.stdout)["files"] == [str(store / "Tiny.Q8_0.pop.gguf"), str(named)]
    assert (named.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize("also", [(), ("mmproj-Tiny.Q8_0",)])
def test_rm_of_model_and_copy_removes_mmproj(store, also):
    named = make_mmproj(store / "mmproj-Tiny.Q8_0.gguf", MMPROJS["llama"])
    assert pop_local("rm", "Tiny.Q8_0", "Tiny.Q8_0.pop", *also, "--yes").exit_code == 0
    assert not named.exists()


def test_rm_keeps_mmproj_of_another_quantisation(store):
    for name in ("See-Q4_K_M.gguf", "See-Q8_0.gguf"):
        make_gguf(store / name, "llama")
    named = make_mmproj(store / "mmproj-See-Q4_K_M.gguf", MMPROJS["llama"])
    assert find_mmproj(store / "See-Q8_0.gguf") == named
    assert pop_local("rm", "See-Q4_K_M", "--yes").exit_code == 0
    assert find_mmproj(store / "See-Q8_0.gguf") == named


def test_rm_removes_nothing_if_a_name_is_unknown(store):
    before = set(store.iterdir())
    done = pop_local("rm", "Tiny.Q8_0", "partet", "--yes")
    assert done.exit_code == 1
    assert "contains no model named 'partet'" in done.stderr
    assert "did you mean parted?" in done.stderr
    assert set(store.iterdir()) == before


@pytest.mark.parametrize("name", ["../outside.gguf", "/etc/passwd", "store/../outside.gguf"])
def test_rm_rejects_files_in_other_folders(store, name):
    outside = store.parent / "outside.gguf"
    outside.touch()
    done = pop_local("rm", name, "--yes")
    assert done.exit_code == 1
    assert "is not in the models folder" in done.stderr
    assert outside.exists()


def test_rm_removes_link_but_not_its_target(store):
    real = (store / "Tiny.Q8_0.gguf").rename(store.parent / "real.gguf")
    (store / "Tiny.Q8_0.gguf").symlink_to(real)
    assert the("Tiny.Q8_0", store).size_bytes == real.stat().st_size
    done = pop_local("rm", "Tiny.Q8_0", "--yes", "--json")
    assert json.loads(done.stdout)["freed_bytes"] < real.stat().st_size
    assert real.exists()
    assert not (store / "Tiny.Q8_0.gguf").is_symlink()


@pytest.mark.parametrize(
    ("name", "found"),
    [("foo.gguf", "foo"), ("foo", "foo"), ("Foo", "Foo"), ("BAR.GGUF", "Bar"), ("other", None)],
)
def test_exact_case_takes_precedence(name, found):
    assert known_name(name, ["Foo", "foo", "Bar"]) == found


def test_rm_without_terminal_requires_yes(store):
    done = pop_local("rm", "Tiny.Q8_0")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--yes" in done.stderr
    assert (store / "Tiny.Q8_0.gguf").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
@pytest.mark.parametrize("answer", ["y", "n", "\x03"])
def test_rm_requires_confirmation_in_terminal(store, answer):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "pop_local", "rm", "Tiny.Q8_0"],
        env=dict(os.environ, NO_COLOR="1"),
        encoding="utf-8",
        timeout=20,
    )
    child.expect(r"Remove 1 file \(.* MB\)\?")
    child.send(answer if answer == "\x03" else answer + "\r")
    child.expect(pexpect.EOF)
    child.close()
    assert (store / "Tiny.Q8_0.gguf").exists() == (answer != "y")
    assert "Traceback" not in child.before
    assert child.exitstatus == {"y": 0, "n": 1, "\x03": 130}[answer]
