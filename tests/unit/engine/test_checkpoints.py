"""Checkpoints of recurrent states and sliding windows, against fresh readings."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pop_base.errors import StoppedError
from pop_local.engine.cache import checkpoints as checkpoints_module
from pop_local.engine.cache.checkpoints import Checkpoints
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.slot import Slot
from pop_local.engine.model import PopModel
from pop_local.engine.prefill import read as read_module
from pop_local.engine.prompt.prompt import Prompt
from support import recipes
from support.architectures import MORE_KEYS
from support.calls import NOISE, first_of, greedy, opened
from support.converted import tiny

RECURRENT = ("granitehybrid", "mamba2", "nemotron_h", "qwen35", "rwkv7")
HYBRIDS_WITH_WINDOWS = ("lfm2",)
# This model takes seconds per test, so only one test reads it.
SLOW = "deepseek4+experts"
WINDOWED = ("cohere2", "gemma3", "gpt-oss+experts")
NAMES = {str(name): name for name in recipes.names()}
N_CTX, N_BATCH, N_END = 1024, 64, 32

pytestmark = pytest.mark.slow


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    """Return tokens of the recipes' vocabulary, which has 128."""
    tokens: list[int] = np.random.default_rng(seed).integers(1, 127, n_tokens).tolist()
    return tokens


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    paths: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in paths:
            recipe, folder = NAMES[name], tmp_path_factory.mktemp(name)
            more = MORE_KEYS.get(recipe.arch, ())
            paths[name] = recipes.make(recipe, folder / "model.gguf", more)
        return paths[name]

    return path


@pytest.fixture(params=[*RECURRENT, *HYBRIDS_WITH_WINDOWS, *WINDOWED])
def name(request: pytest.FixtureRequest) -> str:
    """Name of a recipe for a model whose memory cannot go back."""
    found: str = request.param
    return found


@pytest.fixture
def open_model(name: str, path_of: Any) -> Callable[[], PopModel]:
    """Return a function that opens the model."""
    if name not in NAMES:
        pytest.skip("the recipes are not built")
    options = {"swa_full": False} if name in WINDOWED else {}
    return lambda: opened(path_of(name), n_ctx=N_CTX, n_batch=N_BATCH, **options)


def logits_after(model: PopModel, tokens: list[int]) -> np.ndarray:
    model.read(Prompt(tokens))
    return model.engine.context.logits()[0].copy()


def n_cached(model: PopModel, tokens: list[int]) -> int:
    return model.read(Prompt(tokens)).n_cached


def stop_after(model: PopModel, n_rows: int, tokens: list[int]) -> None:
    """Read a prompt, and stop within the batch that follows `n_rows` cached rows."""
    with suppress(StoppedError), stopped_by(lambda: first_of(model).cache.n_tokens >= n_rows):
        model.read(Prompt(tokens))


def assert_same(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Compare logits of equal batches bit for bit, up to noise for models with windows.

    A window's restored cells have another order, and so have the sums over them.
    """
    if name in RECURRENT:
        np.testing.assert_array_equal(found, expected)
    else:
        assert_near(found, expected)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare logits up to NOISE, which is relative to their standard deviation."""
    assert np.abs(found - expected).max() < NOISE * expected.std()


@pytest.mark.parametrize("name", [*RECURRENT, *HYBRIDS_WITH_WINDOWS, *WINDOWED, SLOW])
def test_second_turn_reads_only_new_tokens(open_model):
    model, question = open_model(), prompt(256)
    conversation = question + greedy(model, question, 20)
    longer = conversation + prompt(128, seed=1)
    # The last sampled token has not been decoded.
    assert n_cached(model, longer) == len(conversation) - 1
    found = model.engine.context.logits()[0].copy()
    assert_near(found, logits_after(open_model(), longer))


def test_rereads_only_changed_answer(name, open_model):
    """The batches of a model that has read the first prompt alone have the same shapes."""
    model, question = open_model(), prompt(256)
    greedy(model, question, 20)
    changed = question + prompt(148, seed=1)
    assert n_cached(model, changed) == 256
    found = model.engine.context.logits()[0].copy()
    other = open_model()
    other.read(Prompt(question))
    assert_same(name, found, logits_after(other, changed))
    assert_near(found, logits_after(open_model(), changed))


def test_undo_retry_and_edits_return_to_a_checkpoint(open_model):
    model, other, first = open_model(), open_model(), prompt(256)
    conversation = first + greedy(model, first, 20)
    # More rows than a window's cells (256), so that rows of the first turn are dropped.
    second = conversation + prompt(400, seed=1)
    n_begun = len(conversation) - 1
    assert n_cached(model, second) == n_begun
    greedy(model, second, 8)
    n_tail = len(second) - N_END
    assert n_tail <= n_cached(model, second) < len(second)  # /retry
    assert_near(model.engine.context.logits()[0], logits_after(other, second))
    greedy(model, second, 8)
    edited = second[: len(conversation) + 5] + prompt(128, seed=2)
    assert n_begun <= n_cached(model, edited) <= len(conversation) + 5
    assert_near(model.engine.context.logits()[0], logits_after(other, edited))
    undone = first + prompt(64, seed=3)
    assert 224 <= n_cached(model, undone) <= 256
    assert_near(model.engine.context.logits()[0], logits_after(other, undone))


def test_repeated_question_equals_fresh_reading_exactly(name, open_model):
    """The prompt's last chunk starts at a checkpoint and has the same rows in both readings."""
    model, question = open_model(), prompt(256)
    expected = logits_after(model, question)
    greedy(model, question, 8)
    cache = first_of(model).cache
    assert cache.truncate(256 - N_END)
    assert n_cached(model, question) == 256 - N_END
    assert_same(name, model.engine.context.logits()[0], expected)


def test_prompts_are_reread_from_the_first_difference(open_model, monkeypatch):
    monkeypatch.setattr(read_module, "EVERY", N_BATCH)
    model, long = open_model(), prompt(640)
    model.read(Prompt(long))
    edited = long[:400] + prompt(240, seed=1)
    found = n_cached(model, edited)
    assert 384 <= found <= 400
    assert_near(model.engine.context.logits()[0], logits_after(open_model(), edited))


@pytest.mark.parametrize("chunk", [0, 3])
def test_stopped_prefill_leaves_valid_cache(open_model, monkeypatch, chunk):
    monkeypatch.setattr(read_module, "EVERY", N_BATCH)
    model, tokens = open_model(), prompt(320)
    n_calls = 0

    def should_stop() -> bool:
        """Stop within a chunk: llama.cpp queries this before each graph node."""
        nonlocal n_calls
        n_calls += first_of(model).cache.n_tokens >= chunk * N_BATCH
        return n_calls > 5

    with stopped_by(should_stop), pytest.raises(StoppedError):
        model.read(Prompt(tokens))
    n_read = first_of(model).cache.n_tokens
    assert n_read < 320
    assert n_cached(model, tokens) >= n_read - N_BATCH
    assert_near(model.engine.context.logits()[0], logits_after(open_model(), tokens))


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "gemma3"])
def test_random_conversations_equal_fresh_readings(open_model, monkeypatch):
    monkeypatch.setattr(read_module, "EVERY", N_BATCH)
    monkeypatch.setattr(checkpoints_module, "MAX_CHECKPOINTS", 5)
    chance = random.Random(7)
    model, fresh, tokens = open_model(), open_model(), prompt(200)
    for seed in range(8):
        n_kept = chance.choice([len(tokens), len(tokens), chance.randrange(1, len(tokens))])
        tokens = tokens[: min(n_kept, 700)] + prompt(chance.randrange(1, 200), seed)
        if chance.random() < 0.3:
            stop_after(model, chance.randrange(len(tokens)), tokens)
        found = logits_after(model, tokens)
        first_of(fresh).cache.clear()
        assert_near(found, logits_after(fresh, tokens))
        assert first_of(model).cache.slot.end_position == len(tokens)
        assert len(first_of(model).cache.checkpoints) <= 5
        if chance.random() < 0.6:
            tokens += greedy(model, tokens, chance.randrange(1, 12))


@pytest.mark.parametrize("n_states", [0, 3])
def test_checkpoints_stay_below_the_cap(open_model, monkeypatch, n_states):
    monkeypatch.setattr(read_module, "EVERY", N_BATCH)
    model = open_model()
    model.read(Prompt(prompt(64)))
    found = first_of(model).cache.checkpoints
    # A window's state grows up to this number of rows.
    cap = int(n_states * max(found.size_bytes / len(found), 1) * 1.5)
    monkeypatch.setattr(checkpoints_module, "MAX_BYTES", cap)
    first_of(model).cache.clear()
    for n in (200, 400, 640):
        model.read(Prompt(prompt(n)))
        assert found.size_bytes <= cap
    assert bool(len(found)) == bool(n_states)


def test_saved_states_contain_no_checkpoints(open_model):
    model, question = open_model(), prompt(256)
    model.read(Prompt(question))
    state = first_of(model).states.save()
    first_of(model).states.restore(state)
    assert len(first_of(model).cache.checkpoints) == 0
    assert n_cached(model, question + prompt(64, seed=1)) == 256


@pytest.mark.parametrize("name", ["mamba2", "qwen35"])
def test_saved_state_does_not_replace_a_better_checkpoint(name, path_of):
    if name not in NAMES:
        pytest.skip("the recipes are not built")
    model = opened(path_of(name), n_ctx=N_CTX, n_batch=N_BATCH)
    first_of(model).states.prompts = PromptCache(2**28)
    stem = prompt(256)
    model.read(Prompt(stem + prompt(200, seed=1)))
    model.read(Prompt(prompt(100, seed=2)))  # stores the first prompt
    assert n_cached(model, stem + prompt(200, seed=1) + [5]) == 456
    model.read(Prompt(prompt(100, seed=2)))
    model.read(Prompt(stem))
    greedy(model, stem, 8)
    # The stored state has more equal rows, but cannot drop the unequal ones.
    assert n_cached(model, stem + prompt(200, seed=1)[:20] + prompt(80, seed=3)) == 256


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_other_models_copy_nothing(tmp_path, monkeypatch, arch):
    monkeypatch.setattr(Slot, "checkpoint", None)
    model, sizes = opened(tiny(tmp_path, arch)), []
    append = first_of(model).cache.append

    def recorded(tokens: list[int], *args: Any) -> None:
        sizes.append(len(tokens))
        append(tokens, *args)

    monkeypatch.setattr(first_of(model).cache, "append", recorded)
    model.read(Prompt(prompt(200)))
    assert len(first_of(model).cache.checkpoints) == 0
    assert not first_of(model).cache.checkpoints.is_needed
    assert len(sizes) == 4  # a tail that fits one chunk is not split


class _FakeSlot:
    context = SimpleNamespace(is_recurrent=True, window=0)

    def checkpoint(self, max_bytes: int) -> np.ndarray:
        return np.zeros(10, np.uint8)


def fake_checkpoints() -> Checkpoints:
    slot: Any = _FakeSlot()
    return Checkpoints(slot)


def test_best_checkpoint_is_the_last_one_before_a_difference():
    chance = random.Random(1)
    for _ in range(200):
        rows = sorted(chance.sample(range(1, 5000), 10))
        found = fake_checkpoints()
        for n in rows:
            found.add(n)
        wanted = chance.randrange(5200)
        assert found.best(wanted) == max([0, *(n for n in rows if n <= wanted)])
        found.drop_after(wanted)
        assert len(found) == sum(n <= wanted for n in rows)


def test_newest_checkpoints_and_wide_gaps_survive():
    found = fake_checkpoints()
    for n in range(10, 5000, 10):
        found.add(n)
        assert found.last == n
        assert len(found) <= checkpoints_module.MAX_CHECKPOINTS
    kept = [found.best(n) for n in range(0, 5000, 500)]
    assert len(set(kept)) > 5
