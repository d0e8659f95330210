"""Refilling, and the exact rows after it."""

import os
from pathlib import Path

import numpy as np
import pytest

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import FULL
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.measure.forced import forced
from support.calls import NOISE, append, first_of, greedy, kv_bytes, opened, prompt, read, set_rule


def kept(pop_file, **options):
    return opened(pop_file, keep_states=True, **options)


def test_refilling_reproduces_the_full_models_cache(pop_file):
    tokens = prompt(200)
    full = opened(pop_file, full=True)
    append(full, tokens)
    model = kept(pop_file)
    append(model, tokens)
    cache, refiller = first_of(model).cache, first_of(model).refiller
    assert (cache.n_exact, refiller.n_refillable) == (0, 200)
    assert first_of(model).states.key != FULL
    progress: list[tuple[int, int]] = []
    assert refiller.refill(on_progress=lambda *counts: progress.append(counts)) == 200
    assert progress == sorted(set(progress)) and progress[-1] == (200, 200)
    assert (cache.n_exact, refiller.n_refillable) == (200, 0)
    assert first_of(model).states.key == FULL
    assert kv_bytes(model) == kv_bytes(full)
    assert refiller.refill() == 0


def test_turns_after_refilling_equal_the_full_models(pop_file):
    """Short questions, which run in full, follow a pruned document."""
    full, model = opened(pop_file), kept(pop_file)
    full.engine.set_mode(Mode.OFF)
    set_rule(model, min_prompt=100)
    tokens = prompt(300)
    tokens += greedy(model, tokens)
    assert first_of(model).cache.n_exact == 0
    for turn in range(3):
        first_of(model).refiller.refill()
        assert first_of(model).cache.n_exact == first_of(model).cache.n_tokens
        tokens += prompt(20, seed=turn + 1)
        np.testing.assert_allclose(read(model, tokens), read(full, tokens), atol=NOISE)
        answer = greedy(model, tokens)
        assert answer == greedy(full, tokens)
        tokens += answer


def test_stopped_refilling_continues_later(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    stops = iter([False] * 40)
    n_first = first_of(model).refiller.refill(should_stop=lambda: next(stops, True))
    assert 0 <= n_first < 200
    assert first_of(model).cache.n_exact == n_first
    assert n_first + first_of(model).refiller.refill() == 200
    full = opened(pop_file, full=True)
    answer = greedy(full, prompt(200))
    assert greedy(model, prompt(200)) == answer


def test_without_states_nothing_is_refilled(pop_file):
    model = opened(pop_file)
    append(model, prompt(200))
    assert (first_of(model).refiller.n_refillable, first_of(model).refiller.refill()) == (0, 0)
    assert backend.require_patched().llama_pop_snapshots_size(model.engine.context.ctx) == 0


def test_rows_of_a_loaded_state_cannot_be_refilled(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    state = first_of(model).states.save()
    first_of(model).states.restore(state)
    assert (first_of(model).cache.n_exact, first_of(model).refiller.n_refillable) == (0, 0)
    append(model, prompt(40, seed=1))
    assert first_of(model).refiller.refill() == 0


def test_exact_state_equals_the_full_models(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    first_of(model).refiller.refill()
    state = first_of(model).states.save()
    assert state.key == FULL
    other = opened(pop_file)
    first_of(other).states.restore(state)
    assert first_of(other).cache.n_exact == 200
    other.engine.set_mode(Mode.OFF)
    assert first_of(other).cache.n_tokens == 200, (
        "the full model's cache stays when pruning is switched off"
    )
    first_of(other).states.restore(state)
    unfinished = kept(pop_file)
    append(unfinished, prompt(200))
    unfinished.engine.set_mode(Mode.OFF)
    assert first_of(unfinished).cache.n_tokens == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted by Linux")
def test_memory_stays_flat_over_many_turns(pop_file):
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = opened(pop_file, keep_states=True)
    tokens = prompt(100)
    for turn in range(200):
        if len(tokens) > 900:
            tokens = tokens[:100]
        tokens += greedy(model, tokens, n=3)
        first_of(model).refiller.refill()
        tokens += prompt(5 + turn % 20, seed=turn)
        if turn == 49:
            before = resident_bytes()
    assert first_of(model).cache.n_exact > 0
    assert resident_bytes() - before < 4 * 2**20


def test_prompt_cache_separates_modes_of_exact_rows(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    first_of(model).refiller.refill()
    first_of(model).states.prompts = PromptCache(2**24)
    for mode in (Mode.CONTEXT, Mode.OFF):
        fresh = opened(pop_file)
        for opened_model in (model, fresh):
            opened_model.engine.set_mode(mode)
        assert greedy(model, prompt(200, seed=1)) == greedy(fresh, prompt(200, seed=1))


def test_measuring_leaves_refilling_unchanged(pop_file):
    model = opened(pop_file, keep_states=True)
    with forced(model):
        pass
    assert (first_of(model).refiller.is_on, first_of(model).settings.keeps_states) == (True, True)


def test_refilling_that_raises_keeps_its_progress(pop_file):
    model = kept(pop_file)
    read(model, prompt(200))

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_of(model).refiller.refill(on_progress=fail)
    n = first_of(model).cache.n_exact
    assert n > 0
    assert first_of(model).refiller.take_refilled() == n
    assert not first_of(model).cache.has_logits
