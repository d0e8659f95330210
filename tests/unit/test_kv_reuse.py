"""Whose K/V are reused: never those of the other mode, nor context rows in a prompt's tail."""

import numpy as np
import pytest
from llama_cpp import LlamaRAMCache

from converter.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from support.calls import (
    MODES,
    NOISE,
    completed,
    evaluated,
    greedy,
    last_logits,
    opened,
    prompt,
    read,
)
from support.converted import tiny
from support.raw import Job, Step, run


@pytest.fixture(scope="module")
def pop_file(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("first", MODES)
def test_switching_never_reuses_the_other_modes_cache(pop_file, first):
    (second,) = (mode for mode in MODES if mode is not first)
    tokens = prompt(200)
    expected = {}
    for mode in MODES:
        fresh = opened(pop_file)
        fresh.set_pop(mode)
        expected[mode] = read(fresh, tokens)
    model = opened(pop_file)
    for mode in (first, second, first):
        model.set_pop(mode)
        np.testing.assert_array_equal(read(model, tokens), expected[mode])
    assert np.abs(expected[Mode.OFF] - expected[Mode.CONTEXT]).max() > 10 * NOISE


def test_switching_to_the_mode_it_has_keeps_the_cache(pop_file):
    model = opened(pop_file)
    read(model, prompt(100))
    model.set_pop(Mode.CONTEXT)
    assert evaluated(model, prompt(100) + prompt(40, seed=1)) == Counters(24, 16)


def test_noise_is_above_that_of_the_unpatched_library(pop_file, unpatched_lib):
    """What the tests here and of the engine allow for, when batches have other shapes."""
    last = Step("decode", "last", tokens=tuple(prompt(200)))
    one, *others = (
        run(Job(str(pop_file), (last,), lib=str(unpatched_lib), n_ubatch=n_ubatch))["last"]
        for n_ubatch in (64, 71, 7, 1)
    )
    assert 0 < max(np.abs(other - one).max() for other in others) < NOISE


@pytest.mark.parametrize("mode", MODES)
def test_the_beginning_of_a_prompt_is_reused(pop_file, mode):
    model = opened(pop_file)
    model.set_pop(mode)
    answered = prompt(100) + greedy(model, prompt(100))
    longer = answered + prompt(40, seed=1)
    counters = evaluated(model, longer)
    # The last sampled token was not decoded before.
    n_cached = len(answered) - 1
    assert counters.n_context + counters.n_full == len(longer) - n_cached
    reused = last_logits(model)
    # The same rows full and pruned, the answer's in one piece: as many as a tail at most.
    fresh = opened(pop_file)
    fresh.set_pop(mode)
    for piece in (longer[:100], longer[100:n_cached], longer[n_cached:]):
        fresh.eval(piece)
    np.testing.assert_allclose(reused, last_logits(fresh), atol=NOISE)
    fresh.clear()
    at_once = np.abs(reused - read(fresh, longer)).max()
    assert at_once < NOISE if mode is Mode.OFF else at_once > NOISE


def test_a_cached_context_token_does_not_end_up_in_a_prompts_tail(pop_file):
    model = opened(pop_file)
    tokens = prompt(200)
    read(model, tokens)
    shorter = tokens[:150]
    assert evaluated(model, shorter) == Counters(0, 16)
    reused = last_logits(model)
    expected = read(opened(pop_file), shorter)
    np.testing.assert_allclose(reused, expected, atol=NOISE)


def test_the_same_prompt_again_evaluates_nothing(pop_file):
    model = opened(pop_file)
    first = read(model, prompt(100))
    assert evaluated(model, prompt(100)) == Counters(0, 0)
    np.testing.assert_array_equal(last_logits(model), first)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_comes_back(pop_file, mode):
    model = opened(pop_file)
    model.set_pop(mode)
    read(model, prompt(100))
    state = model.save_state()
    expected = greedy(model, prompt(100) + prompt(30, seed=1))
    read(model, prompt(90, seed=2))
    model.load_state(state)
    backend.reset_counters(model.ctx)
    assert greedy(model, prompt(100) + prompt(30, seed=1), 1) == expected[:1]
    counters = backend.get_counters(model.ctx)
    assert counters.n_context + counters.n_full == 30


def test_a_saved_state_of_another_mode_or_boundary_is_refused(pop_file):
    model = opened(pop_file)
    read(model, prompt(100))
    state = model.save_state()
    model.set_pop(Mode.OFF)
    with pytest.raises(PopError, match="OFF"):
        model.load_state(state)
    model.set_pop(Mode.CONTEXT)
    model.set_boundary(6)
    with pytest.raises(PopError, match="boundary 4"):
        model.load_state(state)


def test_a_prompt_cache_finds_only_states_of_its_own_mode(pop_file):
    model = opened(pop_file)
    model.set_cache(LlamaRAMCache())
    tokens = prompt(100)
    expected = {}
    for mode in MODES:
        model.set_pop(mode)
        model.clear()
        expected[mode] = completed(model, tokens, max_tokens=8)
    for mode in MODES:
        model.set_pop(mode)
        read(model, prompt(50, seed=3))
        backend.reset_counters(model.ctx)
        again = completed(model, tokens, max_tokens=8)
        counters = backend.get_counters(model.ctx)
        assert again == expected[mode]
        assert counters.n_context == 0, "the prompt was in the cache"
        assert counters.n_full < 30
