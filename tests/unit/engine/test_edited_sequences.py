"""Edited prompts of several sequences, and of a model that is closed."""

import threading

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.engine.prefill.edit import MIN_REUSED
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.slot_scheduler import SlotScheduler
from support.calls import opened, prompt, read
from support.edited_prompts import NEW, OLD, pruned

LONG_EDIT = OLD[:60] + NEW[:250] + OLD[60:]


def test_several_sequences_reuse_and_repair_edited_prompts(pop_file):
    with pruned(pop_file, n_parallel=3) as model, pruned(pop_file, full=True) as full:
        engine = model.engine
        for index, sequence in enumerate(engine.sequences):
            sequence.read(Prompt(prompt(650, seed=index)))
        for index, sequence in enumerate(engine.sequences):
            old = prompt(650, seed=index)
            tokens = NEW[: 20 + index] + old[10:]
            reading = sequence.read(Prompt(tokens))
            assert reading.n_stale > MIN_REUSED
        for sequence in engine.sequences:
            sequence.refiller.refill()
            cache = sequence.cache
            assert cache.n_exact == cache.n_tokens
            sequence.step([7])
            expected = read(full, [*cache.tokens.tolist()])
            np.testing.assert_allclose(sequence.cache.slot.logits[-1], expected, atol=0.03, rtol=0)


def test_edited_prompt_selects_reusable_sequence(pop_file):
    with pruned(pop_file, n_parallel=2) as model:
        scheduler = SlotScheduler(model.engine)
        for index, tokens in enumerate([OLD, prompt(650, seed=3)]):
            scheduler.sequence(index).read(Prompt(tokens))
        edited = Prompt(NEW[:30] + OLD[10:])
        assert scheduler.take(edited) == 0
        assert scheduler.take(edited) == 1


def test_edited_prompt_precedes_short_shared_prefix(pop_file):
    edited = Prompt(NEW[:30] + OLD[10:])
    with pruned(pop_file, n_parallel=2) as model:
        scheduler = SlotScheduler(model.engine)
        scheduler.sequence(0).read(Prompt(OLD))
        scheduler.sequence(1).read(Prompt(NEW[:20] + prompt(600, seed=3)))
        index = scheduler.take(edited)
        scheduler.share(index, edited)
        assert index == 0
        assert scheduler.sequence(index).read(edited).n_stale > MIN_REUSED


@pytest.mark.parametrize("n_parallel", [1, 2])
def test_edited_prompt_must_fit_the_context(pop_file, n_parallel):
    old = prompt(1000)
    with opened(pop_file, keep_states=True, n_parallel=n_parallel) as model:
        sequence = model.engine.sequences[0]
        sequence.read(Prompt(old))
        with pytest.raises(PopError, match="too small for 1,090 tokens"):
            sequence.read(Prompt(NEW[:100] + old[10:]))
        assert sequence.read(Prompt(old)).n_cached >= 1000 - 16


def test_other_answers_continue_while_an_edited_prompt_is_read(pop_file):
    with pruned(pop_file, n_parallel=2) as model:
        first, second = model.engine.sequences
        first.read(Prompt(OLD))
        second.read(Prompt(NEW[:50]))
        steps: list[int] = []
        is_read = threading.Event()

        def answer() -> None:
            with second.cache.slot.working():
                while not is_read.is_set():
                    second.step([7])
                    steps.append(7)

        thread = threading.Thread(target=answer)
        n_steps: list[int] = []
        with first.cache.slot.working():
            thread.start()
            reading = first.read(Prompt(LONG_EDIT), lambda *_: n_steps.append(len(steps)))
        is_read.set()
        thread.join()
        assert reading.n_stale > MIN_REUSED
        assert n_steps[-1] >= n_steps[0] + len(n_steps) - 2
        first.refiller.refill()
        assert first.cache.n_exact == len(LONG_EDIT)
        first.step([7])
        with pruned(pop_file, full=True) as full:
            expected = read(full, [*LONG_EDIT, 7])
        np.testing.assert_allclose(first.cache.slot.logits[-1], expected, atol=0.03, rtol=0)
        assert second.cache.tokens.tolist() == NEW[:50] + steps


def test_sequences_share_only_decoded_rows_of_edited_prompt(pop_file):
    with pruned(pop_file, n_parallel=2) as model:
        scheduler = SlotScheduler(model.engine)
        n_shared: list[int] = []

        def share(done: int, total: int) -> None:
            scheduler.share(1, Prompt([*LONG_EDIT, 5]))
            n_shared.append(model.engine.sequences[1].cache.n_tokens)

        scheduler.sequence(0).read(Prompt(OLD))
        scheduler.sequence(0).read(Prompt(LONG_EDIT), share)
        assert n_shared == [60, 124, 188, 252, 790, 854, 918, 950]


def test_model_can_be_closed_while_an_edited_prompt_is_read(pop_file):
    with pruned(pop_file) as model:

        def close(done: int, total: int) -> None:
            if done >= 64:
                model.close()

        read(model, OLD)
        with pytest.raises(StoppedError):
            model.engine.sequences[0].read(Prompt(LONG_EDIT), close)
        assert model.engine.context.is_closed
