"""Test names of hub models, which every command fetches after confirmation."""

from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from pop_base.progress import Watch
from pop_local.models import model_names
from pop_local.models.model_names import hub_name, hub_names, load_catalog, resolve
from pop_local.workflows.open import base_file
from support.hub_server import Hub, Repo, serving, use_hub
from support.program import called
from support.synthetic import make_gguf

TINY = "hf:acme/tiny-GGUF:Q4_0"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    content = make_gguf(tmp_path / "tiny.gguf", "llama").read_bytes()
    files = {f"tiny-{quant}.gguf": content + quant.encode() for quant in ("Q4_0", "Q8_0")}
    files["tiny-Q4_0.gguf"] = content
    with serving(Hub(repos={"acme/tiny-GGUF": Repo(files)})) as hub:
        use_hub(hub, monkeypatch)
        monkeypatch.setenv(model_names.MODELS_VARIABLE, str(tmp_path / "store"))
        yield hub


def test_user_confirms_only_the_first_download(hub, tmp_path):
    may = Mock(return_value=True)
    watch = Watch(may=may)
    path = base_file(TINY, watch)
    assert path == tmp_path / "store" / "tiny-Q4_0.gguf"
    [question] = may.call_args.args
    assert question.startswith("Fetch ") and question.endswith(" from acme/tiny-GGUF?")
    hub.requests.clear()
    assert base_file(TINY.upper().replace("HF", "hf"), watch) == resolve(TINY) == path
    assert may.call_count == 1 and not hub.requests


def test_existing_file_needs_no_confirmation(hub):
    path = base_file(TINY, Watch(may=lambda question: True))
    assert base_file("hf:acme/tiny-GGUF", Watch()) == path


@pytest.mark.parametrize("command", ["run", "serve", "bench", "convert", "analyze", "inspect"])
def test_commands_suggest_pull_without_a_terminal(hub, command):
    done = called(command, TINY, *["hi"] * (command == "run"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-2:] == [
        f"error: {TINY} must be fetched first",
        f"hint: run `pop-local pull {TINY}`",
    ]
    assert not hub.downloads()


def test_convert_asks_for_confirmation(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("pop_local.ui.watch.asked", lambda question: True)
    done = called("convert", TINY, "--boundary", "6", "--projection", "own", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "tiny-Q4_0.gguf").exists()


def test_table_maps_names_to_hub_files(hub, tmp_path, monkeypatch):
    table = {"model": [], "hub": {"tiny-3.2-1b": "acme/tiny-GGUF:Q8_0"}}
    monkeypatch.setattr(model_names, "_toml", lambda: table)
    for name in ("tiny-3.2-1b", "Tiny3.2:1b"):
        assert hub_name(name) == "hf:acme/tiny-GGUF:Q8_0"
    done = called("pull", "tiny3.2:1b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'store' / 'tiny-Q8_0.gguf'}\n"
    assert resolve("tiny-3.2-1b").name == "tiny-Q8_0.gguf"


def test_table_contains_only_hub_names():
    known = hub_names()
    assert len({model_names.plain(name) for name in known}) == len(known) >= 30
    for entry in load_catalog():
        assert not any(hub_name(alias) for alias in (entry.name, *entry.aliases))
    assert all(repo.count("/") == 1 for repo in known.values())


def test_unknown_name_suggests_the_nearest():
    done = called("pull", "qwen3-8c")
    assert (done.returncode, done.stdout) == (1, "")
    error, _ = done.stderr.splitlines()
    assert error.startswith("error: the catalog contains no model named 'qwen3-8c'")
    assert "qwen3-8b" in done.stderr
