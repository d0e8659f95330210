"""Depth on demand: which rows are exact, which are selected, and refilling."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pop_converter.base.errors import PopError, StoppedError
from pop_local.engine.cache.keys import FULL
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.depth.select import select_rows
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.forced import forced
from support.calibrating import attention
from support.calls import NOISE, append, greedy, kv_bytes, last_logits, opened, prompt, read
from support.converted import tiny

N_BATCH = 64


def test_of_a_prompt_that_is_all_question_its_own_rows_are_selected(pop_file):
    model = opened(pop_file, select=0.1)
    model.rule = replace(model.rule, tail_tokens=4, min_prompt=0)
    selection = model.read(Prompt(prompt(24)))
    assert (selection.n_selected, selection.n_deep) == (2, 1 + 2 + 4)


def kept(pop_file, **options):
    return opened(pop_file, keep_states=True, **options)


def test_refilled_in_the_batches_of_the_prompt_the_cache_is_the_full_models(pop_file, monkeypatch):
    tokens = prompt(200)
    full = opened(pop_file)
    full.set_mode(Mode.OFF)
    append(full, tokens)
    model = kept(pop_file)
    append(model, tokens)
    assert (model.cache.n_exact, model.refiller.n_refillable, model.cache.key == FULL) == (
        0,
        200,
        False,
    )
    # As large as a batch, whatever it takes.
    monkeypatch.setattr(model.refiller, "_adapt", lambda n_rows, took_s: None)
    monkeypatch.setattr(model.refiller, "_chunk", N_BATCH)
    said = []
    assert model.refill(on_progress=lambda done, total: said.append((done, total))) == 200
    assert said == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert (model.cache.n_exact, model.refiller.n_refillable, model.cache.key) == (200, 0, FULL)
    assert model.cache.slot.state()[-1000:] == full.cache.slot.state()[-1000:]
    assert kv_bytes(model) == kv_bytes(full)
    assert model.refill() == 0


def test_turns_after_refilling_are_those_of_the_full_model(pop_file):
    """Questions too short to be pruned, over a document that was."""
    full, model = opened(pop_file), kept(pop_file)
    full.set_mode(Mode.OFF)
    model.rule = replace(model.rule, min_prompt=100)
    said = prompt(300)
    said += greedy(model, said)
    assert model.cache.n_exact == 0
    for turn in range(3):
        model.refill()
        assert model.cache.n_exact == model.cache.n_tokens
        said += prompt(20, seed=turn + 1)
        np.testing.assert_allclose(read(model, said), read(full, said), atol=NOISE)
        answer = greedy(model, said)
        assert answer == greedy(full, said)
        said += answer


def test_refilling_that_is_stopped_goes_on_later(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    asked = iter([False] * 40)
    n_first = model.refill(should_stop=lambda: next(asked, True))
    assert 0 <= n_first < 200
    assert model.cache.n_exact == n_first
    assert n_first + model.refill() == 200
    full = opened(pop_file)
    full.set_mode(Mode.OFF)
    answer = greedy(full, prompt(200))
    assert greedy(model, prompt(200)) == answer


def test_an_answer_is_redone_with_its_prompt(pop_file):
    model = kept(pop_file)
    tokens = prompt(200)
    answer = greedy(model, tokens)
    assert model.refill() == model.cache.n_tokens == 200 + len(answer) - 1


def test_without_states_nothing_is_refilled(pop_file):
    model = opened(pop_file)
    append(model, prompt(200))
    assert (model.refiller.n_refillable, model.refill()) == (0, 0)
    assert backend.keep_size(model.context.ctx) == 0


def test_rows_of_a_loaded_state_cannot_be_redone(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    state = model.cache.save()
    model.cache.restore(state)
    assert (model.cache.n_exact, model.refiller.n_refillable) == (0, 0)
    append(model, prompt(40, seed=1))
    assert model.refill() == 0


def test_an_exact_state_is_the_full_models(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    model.refill()
    state = model.cache.save()
    assert state.key == FULL
    other = opened(pop_file)
    other.cache.restore(state)
    assert other.cache.n_exact == 200
    other.set_mode(Mode.OFF)
    assert other.cache.n_tokens == 200, "the full model's cache stays when pruning is switched off"
    other.cache.restore(state)
    unfinished = kept(pop_file)
    append(unfinished, prompt(200))
    unfinished.set_mode(Mode.OFF)
    assert unfinished.cache.n_tokens == 0


def test_selected_rows_run_all_layers_with_the_tail(pop_file):
    model = opened(pop_file, select=0.1)
    tokens = prompt(300)
    selection = append(model, tokens)
    sink, tail = model.rule.sink_tokens, model.rule.tail_tokens
    n = round(0.1 * (300 - sink - tail))
    counters = backend.get_counters(model.context.ctx)
    assert counters == Counters(300, 0, 0, sink + n + tail)
    assert (selection.n_selected, selection.n_deep) == (n, sink + n + tail)
    assert int(model.cache.rows.is_full[:300].sum()) == sink + n + tail
    assert model.cache.rows.is_full[300 - tail : 300].all()
    logits = last_logits(model)
    assert logits.std() > 0.1
    # The rows that were left out make a difference, as do the rows that were chosen.
    plain, full = opened(pop_file), opened(pop_file)
    full.set_mode(Mode.OFF)
    for other in (plain, full):
        append(other, tokens)
        assert np.abs(logits - last_logits(other)).max() > NOISE


def test_a_short_tail_leaves_the_question_as_it_is(pop_file, monkeypatch):
    asked, words = [], []
    real = backend.set_question

    def set_question(ctx, row):
        asked.append(row)
        real(ctx, row)

    def select(scores, tokens, question, may_be, n):
        words.extend(question)
        assert len(scores) == len(tokens) == len(may_be) == 300 - 32
        return select_rows(scores, tokens, question, may_be, n)

    monkeypatch.setattr(backend, "set_question", set_question)
    monkeypatch.setattr("pop_local.engine.prefill.read.select_rows", select)
    model = opened(pop_file, select=0.1)
    model.rule = replace(model.rule, tail_tokens=4)
    tokens = prompt(300)
    append(model, tokens)
    assert asked == [300 - 32, -1]
    assert words == [token for token in tokens[-32:] if token in words]
    assert len(words) > 4
    assert model.cache.rows.is_full[296:300].all()
    assert not model.cache.rows.is_full[268:296].any()


def test_all_rows_selected_give_the_full_models_logits(pop_file):
    model, full = opened(pop_file, select=1.0, n_batch=512, n_ubatch=512), opened(pop_file)
    full.set_mode(Mode.OFF)
    np.testing.assert_allclose(read(model, prompt(300)), read(full, prompt(300)), atol=NOISE)


def test_a_later_question_selects_among_all_rows(pop_file):
    model = opened(pop_file, select=0.1)
    model.rule = replace(model.rule, min_prompt=100)
    said = prompt(300)
    read(model, said)
    said += prompt(30, seed=1)
    found = model.read(Prompt(said))
    # The question is too short to be pruned: all of it is deep.
    n = found.n_selected
    assert n > 0
    assert found.counters == Counters(30, 0, 0, n + 30)
    assert found.n_deep == 30


def test_none_can_be_selected_where_a_window_drops_rows(tmp_path):
    path = tiny(tmp_path, "gemma3")
    with pytest.raises(PopError, match="sliding window"):
        opened(path, select=0.1, swa_full=False)
    model = opened(path, swa_full=False)
    backend.set_keep(model.context.ctx, True)
    with pytest.raises(PopError, match="swa_full"):
        backend.set_question(model.context.ctx, 10)


def test_rows_without_states_are_read_again_for_a_selection(pop_file):
    model = opened(pop_file, select=0.1)
    said = prompt(300)
    read(model, said)
    state = model.cache.save()
    read(model, prompt(100, seed=2))
    model.cache.restore(state)
    said += prompt(30, seed=1)
    expected = read(opened(pop_file, select=0.1), said)
    assert model.read(Prompt(said)).n_selected > 20
    np.testing.assert_allclose(last_logits(model), expected, atol=NOISE)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize(
    "options", [{"flash_attn": False}, {"flash_attn": True}, {"n_batch": 512, "n_ubatch": 512}]
)
def test_scores_are_those_of_the_attention_itself(tmp_path, arch, options):
    path = tiny(tmp_path, arch, boundary=5)
    tokens, n = prompt(200), 150
    model = kept(path, **options)
    backend.set_question(model.context.ctx, n)
    append(model, tokens)
    expected = np.zeros(n)
    for weights in attention(path, tokens, (1, 2, 3, 4)):
        asked = weights[:, n:, :n].sum(axis=1)
        paid = weights[:, ::16, :n].sum(axis=1)
        expected += (asked / (paid + paid.mean(axis=1, keepdims=True))).max(axis=0)
    np.testing.assert_allclose(backend.get_scores(model.context.ctx, n), expected, rtol=0.02)


def test_another_question_is_counted_anew(pop_file):
    model = kept(pop_file)
    backend.set_question(model.context.ctx, 150)
    append(model, prompt(200))
    first = backend.get_scores(model.context.ctx, 150)
    backend.set_question(model.context.ctx, 200)
    assert backend.get_scores(model.context.ctx, 150).sum() == 0
    append(model, prompt(30, seed=1))
    assert np.abs(backend.get_scores(model.context.ctx, 150) - first).max() > 0
    backend.set_question(model.context.ctx, -1)
    with pytest.raises(PopError, match="no position"):
        backend.get_scores(model.context.ctx, 231)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_none_and_all(pop_file, share):
    with pytest.raises(PopError, match="share"):
        opened(pop_file, select=share)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted by Linux")
def test_memory_stays_flat_over_many_turns(pop_file):
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = opened(pop_file, select=0.1, keep_states=True)
    said = prompt(100)
    for turn in range(200):
        if len(said) > 900:
            said = said[:100]
        said += greedy(model, said, n=3)
        model.refill()
        said += prompt(5 + turn % 20, seed=turn)
        if turn == 49:
            before = resident_bytes()
    assert model.cache.n_exact > 0
    assert resident_bytes() - before < 4 * 2**20


def test_a_prompt_that_is_cached_whole_has_no_selection(pop_file):
    """Its figures are of what was read for it: nothing, or its last token."""
    model = opened(pop_file, select=0.1)
    for _ in range(2):
        *_, last = model.continue_text("a b c d e f g h " * 30, max_tokens=2, temperature=0.0)
    stats = last.stats
    assert stats is not None
    assert stats.n_cached >= stats.n_prompt - 1
    assert (stats.n_selected, stats.n_pruned) == (0, 0)
    assert stats.n_prompt == stats.n_cached + stats.n_full


def test_a_reading_that_was_stopped_before_its_selection_is_made_up_for(pop_file):
    tokens = prompt(300)
    model = opened(pop_file, select=0.1)
    expected = read(model, tokens)
    model.cache.clear()

    def stop_after_two(done, total):
        if done >= 2 * N_BATCH:
            raise StoppedError

    with pytest.raises(StoppedError):
        append(model, tokens, stop_after_two)
    assert not model.cache.rows.is_full[0]
    state = model.cache.save()
    np.testing.assert_allclose(read(model, tokens), expected, atol=NOISE)
    # Saved, its rows have no states: it is read again.
    other = opened(pop_file, select=0.1)
    other.cache.restore(state)
    np.testing.assert_allclose(read(other, tokens), expected, atol=NOISE)
    plain = opened(pop_file, select=0.0)
    plain.cache.restore(state)
    read(plain, tokens)
    assert plain.cache.rows.is_full[0]


def test_without_a_tail_the_last_row_predicts(pop_file):
    tokens = prompt(300)
    model, full = opened(pop_file, select=1.0), opened(pop_file)
    model.rule = replace(model.rule, tail_tokens=0)
    full.set_mode(Mode.OFF)
    np.testing.assert_allclose(read(model, tokens), read(full, tokens), atol=NOISE)
    assert model.cache.rows.is_full[:300].all()


def test_a_prompt_cache_is_of_the_mode_not_of_what_is_cached(pop_file):
    model = kept(pop_file)
    append(model, prompt(200))
    model.refill()
    model.cache.prompts = PromptCache(2**24)
    for mode in (Mode.CONTEXT, Mode.OFF):
        fresh = opened(pop_file)
        for each in (model, fresh):
            each.set_mode(mode)
        assert greedy(model, prompt(200, seed=1)) == greedy(fresh, prompt(200, seed=1))


def test_measuring_leaves_refilling_as_it_was(pop_file):
    model = opened(pop_file, select=0.1)
    with forced(model):
        pass
    assert (model.rule.select, model.refills, model.cache.keeps_states) == (0.1, False, True)


def test_refilling_that_raises_has_done_what_it_did(pop_file):
    model = kept(pop_file)
    read(model, prompt(200))

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.refill(on_progress=fail)
    n = model.cache.n_exact
    assert n > 0
    assert model.refiller.take_refilled() == n
    assert not model.cache.has_logits
