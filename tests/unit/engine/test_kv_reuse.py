"""Reuse of K/V, excluding the other mode's rows and context rows in a tail."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import FULL, SavedState
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from support.calls import (
    MODES,
    NOISE,
    append,
    completed,
    evaluated,
    first_of,
    greedy,
    last_logits,
    opened,
    prompt,
    read,
)
from support.converted import tiny
from support.pop_files import add_to
from support.raw import Job, Step, run
from support.synthetic import make_gguf


@pytest.fixture
def model(pop_file):
    return opened(pop_file)


@pytest.mark.parametrize("first", MODES)
def test_modes_never_share_cached_rows(pop_file, first):
    (second,) = (mode for mode in MODES if mode is not first)
    tokens = prompt(200)
    expected = {}
    for mode in MODES:
        fresh = opened(pop_file)
        fresh.engine.set_mode(mode)
        expected[mode] = read(fresh, tokens)
    model = opened(pop_file)
    for mode in (first, second, first):
        model.engine.set_mode(mode)
        np.testing.assert_array_equal(read(model, tokens), expected[mode])
    assert np.abs(expected[Mode.OFF] - expected[Mode.CONTEXT]).max() > 10 * NOISE


@pytest.mark.parametrize("is_declared", [True, False])
def test_rereads_rows_dropped_by_window(tmp_path, is_declared):
    path = tiny(tmp_path, "gemma3")
    if not is_declared:
        base = make_gguf(tmp_path / "base.gguf", "olmo2")
        path = add_to(base, tmp_path / "olmo2.gguf", {"olmo2.attention.sliding_window": 16})
    model = opened(path, n_ctx=512, swa_full=False)
    read(model, prompt(400))
    tokens = prompt(400)[:100] + prompt(60, seed=1)
    expected = read(opened(path, n_ctx=512, swa_full=False), tokens)
    np.testing.assert_allclose(read(model, tokens), expected, atol=NOISE)


def test_noise_tolerance_exceeds_unpatched_noise(pop_file, unpatched_lib):
    """NOISE is the tests' tolerance for other batch shapes."""
    last = Step("decode", "last", tokens=tuple(prompt(200)))
    first, *others = (
        run(Job(str(pop_file), (last,), lib=str(unpatched_lib), n_ubatch=n_ubatch))["last"]
        for n_ubatch in (64, 71, 7, 1)
    )
    assert 0 < max(np.abs(other - first).max() for other in others) < NOISE


@pytest.mark.parametrize("mode", MODES)
def test_prompt_prefix_is_reused(model, pop_file, mode):
    model.engine.set_mode(mode)
    answered = prompt(100) + greedy(model, prompt(100))
    longer = answered + prompt(40, seed=1)
    counters = evaluated(model, longer)
    # The last sampled token has not been decoded.
    n_cached = len(answered) - 1
    assert counters.n_context + counters.n_full == len(longer) - n_cached
    reused = last_logits(model)
    # The same rows are full and pruned; the answer is one piece, no longer than a tail.
    fresh = opened(pop_file)
    fresh.engine.set_mode(mode)
    for piece in (longer[:100], longer[100:n_cached], longer[n_cached:]):
        append(fresh, piece)
    np.testing.assert_allclose(reused, last_logits(fresh), atol=NOISE)
    first_of(fresh).cache.clear()
    at_once = np.abs(reused - read(fresh, longer)).max()
    assert at_once < NOISE if mode is Mode.OFF else at_once > NOISE


def test_prompt_tail_contains_no_cached_context_token(model, pop_file):
    tokens = prompt(200)
    read(model, tokens)
    shorter = tokens[:150]
    assert evaluated(model, shorter) == Counters(0, 16)
    reused = last_logits(model)
    expected = read(opened(pop_file), shorter)
    np.testing.assert_allclose(reused, expected, atol=NOISE)


def test_repeated_prompt_evaluates_no_tokens(model):
    first = read(model, prompt(100))
    assert evaluated(model, prompt(100)) == Counters(0, 0)
    np.testing.assert_array_equal(last_logits(model), first)


@pytest.mark.parametrize("mode", MODES)
def test_saved_state_is_restored(model, mode):
    model.engine.set_mode(mode)
    read(model, prompt(100))
    state = first_of(model).states.save()
    expected = greedy(model, prompt(100) + prompt(30, seed=1))
    read(model, prompt(90, seed=2))
    first_of(model).states.restore(state)
    backend.reset_counters(model.engine.context.ctx)
    assert greedy(model, prompt(100) + prompt(30, seed=1), 1) == expected[:1]
    counters = backend.get_counters(model.engine.context.ctx)
    assert counters.n_context + counters.n_full == 30


def test_saved_state_of_another_mode_or_boundary_is_refused(model):
    read(model, prompt(100))
    state = first_of(model).states.save()
    model.engine.set_mode(Mode.OFF)
    with pytest.raises(PopError, match="OFF"):
        first_of(model).states.restore(state)
    model.engine.set_mode(Mode.CONTEXT)
    model.engine.sequences[0].set_boundary(6)
    with pytest.raises(PopError, match="boundary 4"):
        first_of(model).states.restore(state)


def n_read(model, tokens) -> int:
    """Return the number of prompt tokens that were not cached."""
    *_, last = model.engine.answer(Prompt(tokens), TurnOptions(max_tokens=1))
    assert last.stats is not None
    return last.stats.n_evaluated


@pytest.mark.parametrize(("capacity_bytes", "is_kept"), [(2**24, True), (2**10, False)])
def test_alternating_prompts_are_cached_within_a_limit(model, capacity_bytes, is_kept):
    first_of(model).states.prompts = PromptCache(capacity_bytes)
    first, second = prompt(100), prompt(100, seed=1)
    assert [n_read(model, first), n_read(model, second)] == [100, 100]
    for tokens in (first, second):
        assert (n_read(model, tokens) <= 16) == is_kept


def test_new_rows_do_not_replace_a_restored_windows_rows(tmp_path):
    """llama.cpp reuses the cells of rows that have left a window, but a later prompt needs them."""
    question, later = prompt(700)[:300] + prompt(60, 3), prompt(700)[:70] + prompt(30, 4)
    with opened(make_gguf(tmp_path / "gemma3.gguf", "gemma3")) as model:
        read(model, prompt(700))
        state = first_of(model).states.save()
        first_of(model).states.restore(state)
        read(model, question)
        assert model.read(Prompt(later)).n_cached == 70
        logits = last_logits(model)
        first_of(model).cache.clear()
        np.testing.assert_allclose(logits, read(model, later), rtol=0, atol=NOISE)


def test_restored_prompt_has_the_same_answer(model):
    longer = prompt(100) + prompt(40, seed=1)
    read(model, prompt(100))
    expected = read(model, longer)
    first_of(model).cache.clear()
    first_of(model).states.prompts = PromptCache(2**24)
    n_read(model, prompt(100))
    n_read(model, prompt(100, seed=2))
    assert n_read(model, longer) == 40
    np.testing.assert_array_equal(last_logits(model), expected)


def test_longer_prompt_replaces_its_prefix(model):
    cache = PromptCache(2**24)
    first_of(model).states.prompts = cache
    for n_tokens in (100, 120, 140):
        n_read(model, prompt(n_tokens))
        n_read(model, prompt(50, seed=3))
    assert len(cache) == 2


def test_full_prompt_cache_evicts_oldest_state(model):
    n_read(model, prompt(100))
    cache = PromptCache(3 * len(first_of(model).cache.slot.state()))
    first_of(model).states.prompts = cache
    for seed in range(1, 6):
        n_read(model, prompt(100, seed))
        assert cache.size_bytes <= cache.capacity_bytes
    assert [n_read(model, prompt(100, seed)) <= 16 for seed in (4, 1)] == [True, False]


def test_models_in_several_threads_share_a_cache():
    cache, interval_s = PromptCache(100), sys.getswitchinterval()

    def use(key: int) -> None:
        for number in range(300):
            tokens = np.full(2 + number % 7, number, np.int32)
            cache.add(str(key), SavedState(FULL, "", tokens, tokens, tokens, bytes(1)))
            cache.best(str(key), Prompt(tokens.tolist()).n_equal)

    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(use, range(4))) == [None] * 4
    finally:
        sys.setswitchinterval(interval_s)
    assert len(cache) == 100


def test_prompt_cache_returns_only_states_of_same_mode(model):
    first_of(model).states.prompts = PromptCache(2**24)
    tokens = prompt(100)
    expected = {}
    for mode in MODES:
        model.engine.set_mode(mode)
        first_of(model).cache.clear()
        expected[mode] = completed(model, tokens, max_tokens=8)
    for mode in MODES:
        model.engine.set_mode(mode)
        read(model, prompt(50, seed=3))
        backend.reset_counters(model.engine.context.ctx)
        again = completed(model, tokens, max_tokens=8)
        counters = backend.get_counters(model.engine.context.ctx)
        assert again == expected[mode]
        assert counters.n_context == 0, "the prompt was in the cache"
        assert counters.n_full < 30


def test_state_that_cannot_be_truncated_is_dropped(model, monkeypatch):
    """Recurrent states are like this after an interrupted prefill."""
    for use in (lambda: append(model, [1]), first_of(model).states.save):
        read(model, prompt(100))
        with monkeypatch.context() as patched, pytest.raises(PopError, match="ahead of the cached"):
            patched.setattr(first_of(model).cache.slot, "truncate", lambda position: False)
            use()
        assert first_of(model).cache.n_tokens == 0


def test_prompt_cache_does_not_mix_models(pop_file, tmp_path):
    cache, tokens = PromptCache(2**24), Prompt(prompt(100))
    paths = [make_gguf(tmp_path / f"{seed}.gguf", "llama", seed=seed) for seed in (0, 1)]
    first, other, again = map(opened, (*paths, paths[0]))
    for model in (first, other, again):
        first_of(model).states.prompts = cache
    first.read(tokens)
    first.read(Prompt(prompt(100, seed=1)))
    with pytest.raises(PopError, match="a different model"):
        first_of(other).states.restore(first_of(first).states.save())
    assert other.read(tokens).n_cached == 0
    assert again.read(tokens).n_cached == 99


def test_cached_prompt_of_a_larger_context_is_read_again(pop_file):
    """Models can share a prompt cache."""
    large, small = opened(pop_file), opened(pop_file, n_ctx=256)
    first_of(large).states.prompts = first_of(small).states.prompts = PromptCache(2**24)
    n_read(large, prompt(300))
    n_read(large, prompt(50, seed=1))
    assert n_read(small, prompt(200)) == 200


def test_empty_prompt_is_an_error(model):
    with pytest.raises(PopError, match="the prompt is empty"):
        model.read(Prompt([]))
