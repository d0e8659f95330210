"""Sequences of one context give the same results as one alone."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.config.limits import MOST_THREADS
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.prefill_throttle import PrefillThrottle
from pop_local.engine.prefill.read import read as read_prompt
from pop_local.engine.prefill.reading import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.slot_scheduler import SlotScheduler
from support.calls import NOISE, first_of, keep_prompts, opened, prompt, set_rule
from support.converted import converted, tiny
from support.synthetic import make_gguf
from support.vision_models import VisionModel, make_vision_model
from support.vision_models import prompt as picture_prompt

LONG = prompt(200)


@pytest.fixture
def model(pop_file):
    return opened(pop_file, n_parallel=3, keep_states=True)


@pytest.fixture(scope="module")
def alone(pop_file):
    return opened(pop_file)


def read_in(model, index: int, tokens: Sequence[int]) -> Read:
    return read_prompt(
        model.engine.sequences[index].states, Prompt(list(tokens)), first_of(model).rule
    )


def logits(model, index: int) -> np.ndarray:
    return model.engine.sequences[index].cache.slot.logits[-1]


def logits_of(model, tokens: Sequence[int], answer: Sequence[int] = ()) -> np.ndarray:
    """Return the logits after an uncached prompt and an answer to it."""
    first_of(model).cache.clear()
    model.read(Prompt(list(tokens)))
    for token in answer:
        model.engine.sequences[0].step([token])
    return first_of(model).cache.slot.logits[-1].copy()


def together(*work) -> list[BaseException | None]:
    """Run each callable in a separate thread; return the exceptions."""
    raised: list[BaseException | None] = [None] * len(work)

    def run(number: int) -> None:
        try:
            work[number]()
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def test_each_sequence_is_read_and_counted_separately(model, alone):
    for index, seed in ((1, 1), (0, 0), (2, 2)):
        tokens = prompt(150 + index, seed)
        counters = read_in(model, index, tokens).counters
        expected = alone.read(Prompt(tokens)).counters
        assert (counters.n_context, counters.n_full) == (expected.n_context, expected.n_full)
        np.testing.assert_allclose(logits(model, index), logits_of(alone, tokens), atol=NOISE)
    assert [each.cache.n_tokens for each in model.engine.sequences] == [150, 151, 152]


def test_answers_share_batches_with_prefill(model, alone, monkeypatch):
    prompts = [prompt(100, seed) for seed in (1, 2)]
    sizes = []
    run = model.engine.context.batch.run

    def counted(ctx, tokens, *rest):
        sizes.append(len(tokens))
        return run(ctx, tokens, *rest)

    monkeypatch.setattr(model.engine.context.batch, "run", counted)
    answered: list[list[int]] = [[], []]
    for index in (0, 1):
        read_in(model, index, prompts[index])
    begun = threading.Barrier(3)

    def answer(index: int) -> None:
        sequence = model.engine.sequences[index]
        with sequence.cache.slot.working():
            begun.wait()
            for _ in range(20):
                token = int(sequence.cache.slot.logits[-1].argmax())
                answered[index].append(token)
                sequence.step([token])

    def read_third() -> None:
        with model.engine.sequences[2].cache.slot.working():
            begun.wait()
            read_in(model, 2, LONG)

    sizes.clear()
    assert together(lambda: answer(0), lambda: answer(1), read_third) == [None] * 3
    assert sum(sizes) == 200 + 40
    assert max(sizes) == 64  # a batch
    assert sizes.count(2) <= 20  # the two answers alone
    assert sum(size > 2 for size in sizes) >= 3  # answers with rows of the prompt
    np.testing.assert_allclose(logits(model, 2), logits_of(alone, LONG), atol=NOISE)
    for index in (0, 1):
        expected = logits_of(alone, prompts[index], answered[index])
        np.testing.assert_allclose(logits(model, index), expected, atol=NOISE)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_rows_in_one_step_equal_single_steps(pop_file, n_parallel):
    model = opened(pop_file, n_parallel=n_parallel)
    sequence = model.engine.sequences[-1]
    sequence.read(Prompt(LONG))
    tokens = prompt(5, seed=7)
    expected = np.concatenate([sequence.step([token]).copy() for token in tokens])
    assert sequence.cache.truncate(len(LONG))
    rows = sequence.step(tokens)
    assert rows.shape == expected.shape
    np.testing.assert_allclose(rows, expected, atol=NOISE)
    np.testing.assert_array_equal(rows.argmax(1), expected.argmax(1))
    assert sequence.cache.tokens.tolist() == [*LONG, *tokens]


def test_two_answers_decode_several_rows_during_prefill(model, monkeypatch):
    """Batches of 64 rows split the two steps of 40 rows."""
    answers = [prompt(40, seed) for seed in (5, 6)]
    expected = []
    for index in (0, 1):
        sequence = model.engine.sequences[index]
        read_in(model, index, prompt(100, seed=index))
        expected.append(np.concatenate([sequence.step([token]) for token in answers[index]]))
        assert sequence.cache.truncate(100)
    batches = []
    run = model.engine.context.batch.run

    def record(ctx, tokens, positions, sequences, outputs):
        batches.append(np.bincount(sequences, minlength=3).tolist())
        return run(ctx, tokens, positions, sequences, outputs)

    monkeypatch.setattr(model.engine.context.batch, "run", record)
    begun = threading.Barrier(3)
    rows = {}

    def answer(index: int) -> None:
        sequence = model.engine.sequences[index]
        with sequence.cache.slot.working():
            begun.wait()
            rows[index] = sequence.step(answers[index])

    def read_third() -> None:
        with model.engine.sequences[2].cache.slot.working():
            begun.wait()
            read_in(model, 2, LONG)

    assert together(lambda: answer(0), lambda: answer(1), read_third) == [None] * 3
    assert max(map(sum, batches)) == 64
    assert any(min(batch) > 0 for batch in batches)
    assert np.sum(batches, axis=0).tolist() == [40, 40, 200]
    for index in (0, 1):
        np.testing.assert_allclose(rows[index], expected[index], atol=NOISE)
        np.testing.assert_array_equal(rows[index].argmax(1), expected[index].argmax(1))


def test_each_sequence_has_its_mode(model, pop_file):
    full = opened(pop_file)
    full.engine.set_mode(Mode.OFF)
    model.engine.sequences[1].set_mode(Mode.OFF)
    assert read_in(model, 0, LONG).counters.n_context > 0
    counters = read_in(model, 1, LONG).counters
    assert (counters.n_context, counters.n_full) == (0, 200)
    np.testing.assert_allclose(logits(model, 1), logits_of(full, LONG), atol=NOISE)
    assert model.engine.sequences[1].cache.n_exact == 200
    assert model.engine.sequences[0].cache.settings.mode is Mode.CONTEXT
    with pytest.raises(PopError, match="ALWAYS"):
        model.engine.sequences[0].set_mode(Mode.ALWAYS)


def test_another_sequences_prefix_is_shared(model, alone):
    read_in(model, 0, LONG)
    other = LONG[:150] + prompt(20, seed=3)
    seats = SlotScheduler(model.engine)
    first = seats.take(Prompt(LONG))
    assert first == 0
    index = seats.take(Prompt(other))
    seats.share(index, Prompt(other))
    found = read_in(model, index, other)
    assert (found.n_cached, found.n_prompt) == (150, 170)
    logits_of(alone, LONG)
    assert alone.read(Prompt(other)).n_cached == 150
    np.testing.assert_allclose(
        logits(model, index), first_of(alone).cache.slot.logits[-1], atol=NOISE
    )
    seats.give_back(index)
    assert model.engine.sequences[0].cache.n_tokens == 200


def test_shared_rows_must_be_complete(model, monkeypatch):
    """Another thread looks up the row while the truncated token is still stored."""
    sequence = model.engine.sequences[0]
    states, cache = sequence.states, sequence.cache
    read_in(model, 0, LONG)
    cache.truncate(150)
    forget_from, counts = cache.forget_from, []

    def look_up(n_rows):
        counts.append(states.n_same(Prompt(LONG)))
        forget_from(n_rows)
        counts.append(states.n_same(Prompt(LONG)))

    monkeypatch.setattr(cache, "forget_from", look_up)
    sequence.step([LONG[150]])
    assert counts == [150, 150]
    assert states.n_same(Prompt(LONG)) == 151


def test_copied_rows_are_refilled(model, pop_file):
    """They have no boundary states, so the refill decodes them again, and the others' passes."""
    full = opened(pop_file)
    full.engine.set_mode(Mode.OFF)
    other = LONG[:150] + prompt(100, seed=3)
    read_in(model, 0, LONG)
    seats = SlotScheduler(model.engine)
    seats.take(Prompt(LONG))
    index = seats.take(Prompt(other))
    seats.share(index, Prompt(other))
    found = read_in(model, index, other)
    assert (found.n_cached, found.n_exact < 150, found.n_stale) == (150, True, 0)
    sequence = model.engine.sequences[index]
    seats.give_back(index)
    assert seats.refillable() == index
    assert sequence.refiller.refill() == 250 - found.n_exact
    assert sequence.cache.n_exact == 250
    assert model.engine.sequences[0].cache.n_exact < 200
    sequence.step([5])
    np.testing.assert_allclose(logits(model, index), logits_of(full, [*other, 5]), atol=NOISE)


def test_copied_rows_remain_when_their_source_changes(model):
    read_in(model, 0, LONG)
    seats = SlotScheduler(model.engine)
    seats.take(Prompt(LONG))
    index = seats.take(Prompt(LONG[:150]))
    seats.share(index, Prompt(LONG[:150]))
    model.engine.sequences[0].cache.clear()
    read_in(model, 0, prompt(180, seed=4))
    assert read_in(model, index, LONG).n_cached == 150
    expected = logits(model, index).copy()
    model.engine.sequences[2].cache.clear()
    read_in(model, 2, LONG)
    np.testing.assert_allclose(logits(model, 2), expected, atol=NOISE)


def test_refilled_sequence_equals_full_model_despite_other_sequences(model, pop_file):
    full = opened(pop_file)
    full.engine.set_mode(Mode.OFF)
    read_in(model, 0, prompt(90, seed=5))
    read_in(model, 1, LONG)
    model.engine.sequences[1].refiller.refill()
    longer = [*LONG, 7, 8]
    set_rule(model, min_prompt=1000)
    read_in(model, 1, longer)
    np.testing.assert_allclose(logits(model, 1), logits_of(full, longer), atol=NOISE)


@pytest.mark.parametrize("tail_tokens", [0, 16])
def test_rows_with_logits_run_full(tmp_path, monkeypatch, tail_tokens):
    """The backend runs full rows in a context batch with the decode kernels."""
    plan = {"boundary": 4, "tail_tokens": tail_tokens, "min_prompt": 0}
    path = converted(make_gguf(tmp_path / "llama.gguf", "llama"), tmp_path, **plan)
    levels = []
    set_reading = backend.set_reading

    def noted(ctx, reading):
        levels.append(reading)
        set_reading(ctx, reading)

    monkeypatch.setattr(backend, "set_reading", noted)
    read_in(opened(path, n_parallel=2), 1, prompt(192))
    assert levels[0] is levels[-1] is Reading.SOME  # the batches with sink and logits
    assert Reading.CONTEXT in levels


def test_stopping_one_sequence_leaves_the_others(model, alone):
    """The other sequence's rows continue."""
    begun = threading.Barrier(2)

    def stopped() -> None:
        cache = model.engine.sequences[0].cache
        with cache.slot.working(), stopped_by(lambda: cache.n_tokens >= 64):
            begun.wait()
            read_in(model, 0, LONG)

    def whole() -> None:
        with model.engine.sequences[1].cache.slot.working():
            begun.wait()
            read_in(model, 1, LONG)

    raised = together(stopped, whole)
    assert isinstance(raised[0], StoppedError)
    assert raised[1] is None
    assert model.engine.sequences[0].cache.n_tokens < 200
    np.testing.assert_allclose(logits(model, 1), logits_of(alone, LONG), atol=NOISE)
    read_in(model, 0, LONG)
    np.testing.assert_allclose(logits(model, 0), logits_of(alone, LONG), atol=NOISE)


def test_exception_of_should_stop_reaches_only_its_sequence(model):
    def broken() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), stopped_by(broken):
        read_in(model, 0, LONG)
    assert read_in(model, 1, LONG).n_prompt == 200


def test_failed_batch_raises_for_all_its_sequences(model, monkeypatch):
    read_in(model, 1, LONG[:50])
    monkeypatch.setattr(model.engine.context.batch, "run", lambda *_: 1)
    with pytest.raises(PopError):
        model.engine.sequences[1].step([5])
    monkeypatch.undo()
    read_in(model, 1, LONG[:60])
    assert model.engine.sequences[1].cache.n_tokens == 60


def test_evicted_prompts_return_from_the_prompt_cache(model):
    keep_prompts(model, PromptCache(2**24))
    read_in(model, 1, LONG)
    read_in(model, 1, prompt(120, seed=4))
    found = read_in(model, 2, LONG)
    assert found.n_cached >= 150


def test_single_sequence_states_are_not_restored_into_several(model, pop_file, caplog):
    """Their format differs, and a failed attempt would lose the cached rows."""
    prompts = PromptCache(2**24)
    with opened(pop_file) as one:
        first_of(one).states.prompts = prompts
        one.read(Prompt(LONG))
        first_of(one).states.store()
    keep_prompts(model, prompts)
    read_in(model, 1, LONG[:50])
    assert len(prompts) == 1
    assert read_in(model, 1, LONG).n_cached > 0
    assert "state" not in caplog.text


def test_options_that_exclude_several_sequences_are_refused(pop_file, tmp_path):
    with pytest.raises(PopError, match="sliding windows can read only one prompt at a time"):
        opened(tiny(tmp_path, "gemma3"), n_parallel=2)
    with pytest.raises(PopError, match="n_parallel is 0"):
        opened(pop_file, n_parallel=0)
    with pytest.raises(PopError, match="n_threads is 513"):
        opened(pop_file, n_threads=MOST_THREADS + 1)
    with pytest.raises(PopError, match="batches of 2 tokens are too small"):
        opened(pop_file, n_parallel=3, n_batch=2, n_ubatch=2)


def test_each_sequence_has_the_whole_context_length(model):
    assert model.engine.context.n_ctx == 1024
    for index in range(3):
        read_in(model, index, prompt(1000, seed=index))
    assert [each.cache.n_tokens for each in model.engine.sequences] == [1000] * 3


def test_logits_of_all_rows_come_from_one_sequence(model, alone):
    read_in(model, 0, LONG)
    cache = model.engine.sequences[1].cache
    with cache.slot.exclusive(), cache.slot.interruptible():
        cache.append(LONG[:50], Outputs.ALL, np.ones(50, bool))
        last = model.engine.context.logits(50)[-1].copy()
    first_of(alone).cache.clear()
    first_of(alone).cache.append(LONG[:50], Outputs.ALL, np.ones(50, bool))
    np.testing.assert_allclose(last, alone.engine.context.logits(50)[-1], atol=NOISE)


@pytest.mark.parametrize("step_s", [0.02, 0.06, 0.5])
def test_prefill_leaves_answers_half_their_speed(step_s):
    pace = PrefillThrottle(512)
    assert pace.max_prompt_rows(0) == 512
    pace.record(0, 8, 0.500)  # too few rows for an estimate
    assert pace.max_prompt_rows(2) == 64

    def seconds(n_rows: int) -> float:
        return step_s + (0.010 + 0.0008 * n_rows if n_rows else 0.0)

    pace.record(0, 512, 512 * 0.0008)
    pace.record(2, 0, seconds(0))
    taken = []
    for _ in range(200):
        n_rows = pace.max_prompt_rows(2)
        taken.append((n_rows, seconds(n_rows)))
        pace.record(2, *taken[-1])
    total_s = sum(each for _, each in taken)
    assert 0.5 <= step_s * len(taken) / total_s <= 0.6
    assert sum(n for n, _ in taken) / total_s > 0.4 / 0.0008  # rows per second
    assert max(each for _, each in taken[20:]) <= step_s + max(0.25, step_s) + 0.02


def test_prefill_time_is_repaid_by_decode_steps():
    pace = PrefillThrottle(512)
    pace.record(0, 512, 0.4)
    pace.record(1, 0, 0.05)
    pace.record(1, 200, 0.25)
    n_alone = 0
    while not pace.max_prompt_rows(1):
        pace.record(1, 0, 0.05)
        n_alone += 1
    assert n_alone == 4
    assert pace.max_prompt_rows(600 - 90) == 2


def test_prefill_continues_after_the_process_was_suspended():
    pace = PrefillThrottle(512)
    pace.record(1, 0, 0.05)
    pace.record(1, 64, 3600.0)
    n_alone = 0
    while not pace.max_prompt_rows(1):
        pace.record(1, 0, 0.05)
        n_alone += 1
    assert n_alone * 0.05 < 1


def test_every_sequence_reads_images(tmp_path):
    vision_model = VisionModel("qwen2vl", make_vision_model(tmp_path, "qwen2vl"))
    with vision_model.opened() as one, vision_model.opened(n_parallel=2) as model:
        made = picture_prompt(one, "a b c d", 3)
        expected = one.read(made)
        read_in(model, 0, made.tokens[:1])
        found = read_prompt(
            model.engine.sequences[1].states,
            picture_prompt(model, "a b c d", 3),
            first_of(model).rule,
        )
        assert found.counters == expected.counters
        np.testing.assert_allclose(
            logits(model, 1), first_of(one).cache.slot.logits[-1], atol=NOISE
        )
        assert model.engine.sequences[1].cache.images == first_of(one).cache.images
