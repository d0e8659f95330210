"""The stored KV caches of earlier prompts: written only on request, found again, shown, removed."""

import json
from pathlib import Path

import pytest

from pop_local.config import settings
from pop_local.engine.cache.disk_store import DiskStore
from support.converted import tiny
from support.program import called

TEXT = "the quick brown fox jumps over the lazy dog, " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return tiny(folder, chat_template="{{ messages[0]['content'] }}")


@pytest.fixture(autouse=True)
def empty_state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path / "state"))


def ask(model: Path, question: str, *options: str) -> dict[str, int]:
    """Return the statistics of an answer of one token."""
    shared = ("--threads", "1", "--max-tokens", "1", "--ctx", "1024", "--json")
    result = called("run", str(model), question, *shared, *options)
    assert result.returncode == 0, result.stderr
    report: dict[str, int] = json.loads(result.stdout)["stats"]
    return report


def test_next_command_reuses_stored_prompt(model):
    first = ask(model, TEXT, "--cache-disk", "1")
    second = ask(model, TEXT + "and more", "--cache-disk", "1")
    assert first["n_cached"] == 0
    assert second["n_cached"] >= first["n_prompt"] - 17
    cleared = called("cache", "clear")
    assert "Removed 2 stored prompts from" in cleared.stderr
    assert list(settings.prompts_dir().iterdir()) == []


def test_clear_removes_files_of_another_version():
    settings.prompts_dir().mkdir(parents=True)
    (settings.prompts_dir() / "another version.popstate").write_bytes(b"x")
    (settings.prompts_dir() / ".a.popstate.4194305.partial").write_bytes(b"x")
    assert "Removed 1 stored prompt from" in called("cache", "clear").stderr
    assert list(settings.prompts_dir().iterdir()) == []


def test_stores_nothing_without_the_option(model):
    ask(model, TEXT)
    assert not settings.prompts_dir().exists()


def test_setting_enables_disk_store(model, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_CACHE_DISK", "1")
    ask(model, TEXT)
    assert len(list(settings.prompts_dir().iterdir())) == 1


def test_reuse_option_rereads_changed_prompt(model):
    ask(model, "Monday. " + TEXT, "--cache-disk", "1")
    edited = ask(model, "Tuesday morning. " + TEXT, "--cache-disk", "1")
    exact = ask(model, "Friday noon. " + TEXT, "--cache-disk", "1", "--reuse", "exact")
    assert edited["n_stale"] > 256
    assert exact["n_stale"] == 0
    assert exact["n_cached"] < 5


def test_quantized_cache_has_separate_smaller_entries(model):
    types = ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0")
    ask(model, TEXT, "--cache-disk", "1")
    assert ask(model, TEXT, "--cache-disk", "1", *types)["n_cached"] == 0
    assert ask(model, TEXT + "and more", "--cache-disk", "1", *types)["n_cached"] > 0
    shown = DiskStore(settings.prompts_dir(), 2**30).stored()
    per_token = sorted(state.size_bytes / len(state.tokens) for state in shown)
    assert 0.5 < per_token[0] / per_token[-1] < 0.6  # 34 bytes instead of 64 for 32 values
