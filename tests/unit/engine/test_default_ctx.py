"""Test the default context length, which depends on the model and the free memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pop_base.progress import Watch
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import loading
from pop_local.engine.llama.context import ContextOptions
from pop_local.engine.llama.loading import default_ctx, kv_bytes
from pop_local.workflows.open import open_model
from support.synthetic import make_gguf


@pytest.fixture
def source(tmp_path):
    return read_source(make_gguf(tmp_path / "long.gguf", "llama", n_ctx_train=40_000))


def free_for(source, n_tokens: int) -> int:
    """Return the free memory, a quarter of which is enough for the K/V of `n_tokens` tokens."""
    return 4 * kv_bytes(source_shape(source), n_tokens)


def test_default_is_trained_length_if_memory_suffices(source):
    assert default_ctx(source, 1, free_for(source, 40_000 + 256)) == 40_000


def test_little_memory_limits_the_default_length(source):
    assert default_ctx(source, 1, free_for(source, 10_240)) == 10_240
    assert default_ctx(source, 2, free_for(source, 10_240)) == 5_120
    assert default_ctx(source, 1, free_for(source, 10)) == 2_048


def test_unknown_trained_length_gets_a_default(tmp_path):
    unknown = read_source(make_gguf(tmp_path / "unknown.gguf", "llama", n_ctx_train=0))
    assert default_ctx(unknown, 1, 10**12) == 8_192


def test_opening_a_model_checks_free_memory(source, monkeypatch):
    memory = SimpleNamespace(available=free_for(source, 4_096))
    monkeypatch.setattr(
        loading,
        "psutil",
        SimpleNamespace(virtual_memory=lambda: memory, swap_memory=lambda: SimpleNamespace(free=0)),
    )
    notes: list[str] = []
    options = EngineOptions(str(source.first.path))
    with open_model(options, Watch(on_note=notes.append)) as model:
        assert model.engine.context.n_ctx == 4_096
    [note] = notes
    assert note.startswith("The context is limited to 4,096 of 40,000 tokens, because")
    shorter = replace(options, context=ContextOptions(n_ctx=1024))
    with open_model(shorter, Watch(on_note=notes.append)) as model:
        assert model.engine.context.n_ctx == 1_024 and len(notes) == 1
