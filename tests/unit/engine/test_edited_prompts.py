"""Edited prompts reuse cached rows, and a refill makes these equal to a fresh full reading."""

import os
from typing import Any

import numpy as np
import pytest

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.shifting import can_shift
from pop_local.engine.model import PopModel
from pop_local.engine.prefill import edit
from pop_local.engine.prefill.edit import MIN_REUSED
from pop_local.engine.prefill.reading import PrefillStoppedError
from pop_local.engine.prompt.prompt import Prompt
from support.calls import NOISE, first_of, kv_bytes, last_logits, prompt, read
from support.converted import tiny
from support.edit_operations import Operations, stop_after, stopping
from support.edited_prompts import EDITS, NEW, OLD, Tokens, pruned

N_OPERATIONS = int(os.environ.get("EDIT_OPERATIONS", "80"))


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen2"])
def arch_file(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def model(pop_file):
    """Return a model that has read OLD."""
    with pruned(pop_file) as model:
        read(model, OLD)
        yield model


def fresh(path, tokens: Tokens, **options: Any) -> tuple[bytes, np.ndarray]:
    """Return the state and logits after a full reading of an empty cache."""
    with pruned(path, full=True, **options) as model:
        logits = read(model, tokens)
        return kv_bytes(model), logits


def repaired(model: PopModel) -> tuple[bytes, np.ndarray]:
    """Refill the cache; return its state, and the logits of its last token read again."""
    cache = first_of(model).cache
    first_of(model).refiller.refill()
    assert cache.n_exact == cache.n_tokens
    assert cache.n_stale(cache.n_tokens) == 0
    state = kv_bytes(model)
    model.engine.set_mode(Mode.OFF)
    logits = read(model, cache.tokens.tolist())
    model.engine.set_mode(Mode.CONTEXT)
    return state, logits


@pytest.mark.parametrize("name", EDITS)
def test_refill_after_edit_makes_cache_exact(arch_file, name):
    tokens = EDITS[name]
    state, logits = fresh(arch_file, tokens)
    with pruned(arch_file) as model:
        read(model, OLD)
        reading = model.read(Prompt(tokens))
        cache = first_of(model).cache
        assert cache.tokens.tolist() == tokens
        assert reading.counters.n_rows == len(tokens) - reading.n_cached
        assert reading.counters.n_rows < 200
        assert MIN_REUSED < reading.n_stale <= reading.n_cached
        assert cache.n_stale(len(tokens)) >= reading.n_stale
        assert cache.slot.end_position == len(tokens)
        repaired_state, repaired_logits = repaired(model)
    assert repaired_state == state
    np.testing.assert_allclose(repaired_logits, logits, rtol=0, atol=NOISE)  # a batch of one row


@pytest.mark.parametrize(
    "name, n_rows",
    [
        ("one token", 1 + 16),
        ("a removed passage", 80),
        ("an inserted passage", 90 + 90),
        ("the oldest quarter removed", 520 // 4),
    ],
)
def test_decodes_one_last_row_again_per_changed_token(model, name, n_rows):
    assert model.read(Prompt(EDITS[name])).counters.n_rows == n_rows


def test_state_is_edited_only_if_it_saves_work(pop_file):
    """Reject a state that matches more rows if only its first 10 rows could be reused."""
    base = prompt(340, seed=3)
    tokens = base[:10] + prompt(170, seed=4) + base[10:]
    with pruned(pop_file, prompt_cache=PromptCache(2**26)) as model:
        read(model, base)
        read(model, tokens[:100] + NEW)
        assert model.read(Prompt(tokens)).n_cached == 100


def test_prompt_may_repeat_its_beginning(model, pop_file):
    tokens = OLD[:150] + OLD
    assert model.read(Prompt(tokens)).counters.n_rows == 150
    assert repaired(model)[0] == fresh(pop_file, tokens)[0]


@pytest.mark.parametrize(
    "options",
    [{"flash_attn": False}, {"type_k": 8, "type_v": 8}],
    ids=["without flash attention", "q8_0"],
)
def test_both_cache_types_are_repaired(pop_file, options):
    tokens = EDITS["a longer first line"]
    expected = fresh(pop_file, tokens, **options)
    with pruned(pop_file, **options) as model:
        read(model, OLD)
        read(model, tokens)
        state, logits = repaired(model)
    assert state == expected[0]
    np.testing.assert_allclose(logits, expected[1], rtol=0, atol=NOISE)


@pytest.fixture
def aborted_moves(monkeypatch):
    """Return a function that makes each later move fail, and a list of the moves' arguments."""
    move, n_moves = backend.move_rows, []

    def move_and_abort(ctx, *arguments):
        api = backend.bindings()
        stop, no_stop = api.ggml_abort_callback(lambda _: True), api.ggml_abort_callback(0)
        n_moves.append(arguments)
        api.llama_set_abort_callback(ctx, stop, None)
        try:
            move(ctx, *arguments)
        finally:
            api.llama_set_abort_callback(ctx, no_stop, None)

    return lambda: monkeypatch.setattr(backend, "move_rows", move_and_abort), n_moves


def test_rows_with_invalid_k_are_neither_used_nor_stored(pop_file, aborted_moves):
    abort, n_moves = aborted_moves
    tokens = EDITS["an inserted passage"]
    with pruned(pop_file, prompt_cache=PromptCache(2**24)) as model:
        read(model, OLD)
        assert can_shift(model.engine.context)
        abort()
        assert model.read(Prompt(tokens)).n_stale == 0
        assert len(n_moves) == 1
        assert repaired(model)[0] == fresh(pop_file, tokens)[0]
        read(model, OLD)
        assert repaired(model)[0] == fresh(pop_file, OLD)[0]


def test_all_rows_are_dropped_if_invalid_ones_cannot_be_removed(tmp_path, aborted_moves):
    """The window has dropped rows before the edit, so the cache cannot be truncated there."""
    abort, n_moves = aborted_moves
    old = prompt(2000, seed=3)
    sources = np.delete(np.arange(2000, dtype=np.int32), slice(1300, 1310))
    options = {"swa_full": False, "n_ubatch": 64}
    with pruned(tiny(tmp_path, "gemma3", swa_window=700), **options) as model:
        read(model, old)
        assert can_shift(model.engine.context)
        abort()
        cache = first_of(model).cache
        assert not cache.edit(np.array(old, np.int32)[sources], sources)
        assert len(n_moves) == 1
        assert cache.n_tokens == cache.slot.end_position == 0


def test_stale_rows_change_logits_slightly(model):
    """Stale rows are approximate: other logits than a fresh pruned reading's, but close ones."""
    tokens = EDITS["a changed line"]
    edited = read(model, tokens)
    first_of(model).cache.clear()
    expected = read(model, tokens)
    assert np.abs(edited - expected).max() > NOISE
    assert np.corrcoef(edited, expected)[0, 1] > 0.9


@pytest.mark.parametrize(("arch", "seed"), [("llama", 0), ("gemma3", 1)])
def test_random_operations_are_repaired(tmp_path, arch, seed):
    path = tiny(tmp_path, arch)
    with pruned(path) as model, pruned(path, full=True) as full:
        operations = Operations(model, full, seed)
        operations.run(N_OPERATIONS)
        assert operations.n_edited > N_OPERATIONS // 50
        assert operations.n_checked > N_OPERATIONS // 100
        assert operations.n_equal > 0


def test_interrupted_repair_completes_later(model, pop_file):
    tokens = EDITS["an inserted passage"]
    read(model, tokens)
    refiller, cache = first_of(model).refiller, first_of(model).cache
    n_stops = 0
    while cache.n_exact < len(tokens):
        refiller.refill(stop_after(2 + 20 * n_stops))
        n_stops += 1
        assert n_stops < 1000
    assert n_stops > 3
    assert kv_bytes(model) == fresh(pop_file, tokens)[0]


@pytest.mark.parametrize("after", [0, 20, 60, 100, 150])
def test_stopped_read_keeps_the_rows_after_its_gap(model, pop_file, after):
    tokens = OLD[:200] + NEW[:150] + OLD[200:]
    with pytest.raises(PrefillStoppedError) as stopped:
        model.engine.sequences[0].read(Prompt(tokens), stopping(after))
    n_decoded = stopped.value.read.counters.n_rows
    cache = first_of(model).cache
    assert n_decoded == min(150, -(-after // 64) * 64)
    assert cache.tokens.tolist() == OLD[:200] + NEW[:n_decoded] + OLD[200:-125]
    assert cache.slot.end_position == cache.n_tokens == n_decoded + stopped.value.read.n_cached
    reading = model.read(Prompt(tokens))
    assert reading.counters.n_rows == 150 - n_decoded + 125
    assert reading.n_stale == 500 - 125 == stopped.value.read.n_stale
    assert repaired(model)[0] == fresh(pop_file, tokens)[0]


def test_rows_that_have_left_a_window_are_not_reused(tmp_path):
    tokens = EDITS["a longer first line"]
    with pruned(tiny(tmp_path, "gemma3"), swa_full=False) as model:
        read(model, OLD)
        assert model.read(Prompt(tokens)).n_stale == 0
        logits = last_logits(model)
        first_of(model).cache.clear()
        np.testing.assert_allclose(logits, read(model, tokens), atol=NOISE)


def test_rows_do_not_move_if_every_layer_has_a_window(tmp_path):
    """llama.cpp crashes when it rotates the rows of a cache without layers."""
    with pruned(tiny(tmp_path, "gemma3", n_layer=4, boundary=2)) as model:
        read(model, OLD)
        assert model.read(Prompt(EDITS["a longer first line"])).n_stale == 0


def test_answers_continue_after_stale_rows(model, pop_file):
    tokens = EDITS["a removed passage"]
    read(model, tokens)
    for token in NEW[:5]:
        model.engine.sequences[0].step([token])
    longer = tokens + NEW[:5] + NEW[100:140]
    reading = model.read(Prompt(longer))
    assert reading.n_cached == len(tokens) + 5
    assert reading.n_stale > 0
    assert repaired(model)[0] == fresh(pop_file, longer)[0]


def test_prompt_cache_returns_state_reusable_by_edit(pop_file):
    other = prompt(600, seed=7)
    tokens = EDITS["a shorter first line"]
    with pruned(pop_file, prompt_cache=PromptCache(2**24)) as model:
        read(model, OLD)
        read(model, other)
        reading = model.read(Prompt(tokens))
        assert reading.n_stale > MIN_REUSED
        assert reading.counters.n_rows == 5 + 45


def test_restored_state_catches_up_from_its_exact_rows(model, pop_file, tmp_path):
    tokens = EDITS["an inserted passage"]
    first_of(model).refiller.refill()
    read(model, tokens)
    states, cache = first_of(model).states, first_of(model).cache
    n_exact = cache.n_exact
    assert 100 < n_exact < len(tokens)
    saved = states.save()
    cache.clear()
    states.restore(saved)
    assert cache.n_exact == n_exact
    first_of(model).refiller.refill()
    assert kv_bytes(model) == fresh(pop_file, tokens)[0]


@pytest.mark.parametrize(("name", "redone"), [("a longer first line", 8), ("a changed line", 0)])
def test_moved_full_rows_near_a_change_are_decoded_again(model, name, redone):
    tokens = EDITS[name]
    must_be_full = np.zeros(len(tokens), bool)
    must_be_full[[100, 105, 200, 541, 542]] = True
    cache, rule = first_of(model).cache, first_of(model).rule
    cache.is_full[:] = True
    reusable = edit.ReusableRows(cache, Prompt(tokens), rule)
    without = reusable.edit(cache, 0, np.zeros(len(tokens), bool))
    sources = reusable.edit(cache, 0, must_be_full)
    again = np.flatnonzero(sources != without)
    # Between rows 100 and 105, another batch would take longer than four more rows.
    assert again.tolist() == [*range(100, 106), 200, 541][:redone]
