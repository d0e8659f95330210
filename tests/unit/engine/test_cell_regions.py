"""A sequence's results are the same bits, whatever other sequences read and where their rows are.

The pop files are read with our kernels, whose results do not depend on how a prompt is split.
"""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from pop_converter.base.errors import PopError, StoppedError
from pop_local.engine.llama.cell_regions import BLOCK_CELLS
from pop_local.engine.llama.devices import has_kernels
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.read import read
from pop_local.engine.prefill_scheduler import SHORT_ROWS, PrefillTurns, QueuedPrompt
from pop_local.engine.prompt.prompt import Prompt
from support.calls import opened, prompt

pytestmark = pytest.mark.skipif(not has_kernels(), reason="no kernels for this processor")

N_STEPS = 5
LONG = prompt(2300, seed=1)  # two blocks and a part of a third one


@pytest.fixture
def model(pop_file):
    with opened(pop_file, n_parallel=3, n_ctx=4096, keep_states=True) as model:
        yield model


def read_in(model: PopModel, index: int, tokens: Sequence[int]) -> None:
    sequence = model.engine.sequences[index]
    read(sequence.states, Prompt(list(tokens)), sequence.rule)


def answer(model: PopModel, index: int) -> np.ndarray:
    """Return the logits of the prompt's last row and of answer rows: [N_STEPS + 1, n_vocab]."""
    sequence = model.engine.sequences[index]
    found = [sequence.cache.slot.logits.copy()]
    for _ in range(N_STEPS):
        sequence.step(int(found[-1].argmax()))
        found.append(sequence.cache.slot.logits.copy())
    return np.array(found)


def lone_answer(model: PopModel, tokens: Sequence[int]) -> np.ndarray:
    for sequence in model.engine.sequences:
        sequence.cache.clear()
    read_in(model, 0, tokens)
    found = answer(model, 0)
    model.engine.sequences[0].cache.clear()
    return found


@pytest.mark.parametrize("n_other", [1, 37, 64, BLOCK_CELLS + 3])
@pytest.mark.parametrize("n_rows", [100, 2300])
def test_rows_of_other_sequences_change_no_bit(model, n_other, n_rows):
    expected = lone_answer(model, LONG[:n_rows])
    read_in(model, 0, prompt(n_other, seed=2))
    read_in(model, 2, LONG[:n_rows])
    np.testing.assert_array_equal(answer(model, 2), expected)
    read_in(model, 0, LONG[:n_rows])  # after other rows in the same sequence
    np.testing.assert_array_equal(answer(model, 0), expected)


def test_an_interrupted_prompt_equals_a_lone_one_bit_by_bit(model):
    """Another sequence reads and answers a question after each chunk, also during other batches."""
    expected = lone_answer(model, LONG)
    turns, n_asked = PrefillTurns(), 0
    slot = model.engine.sequences[0].cache.slot

    def ask() -> None:
        nonlocal n_asked
        short = QueuedPrompt(Prompt([7]), "", 1)
        turns.begin(short, lambda: False)
        with model.engine.sequences[1].cache.slot.working():
            model.engine.sequences[1].cache.clear()
            read_in(model, 1, prompt(30 + n_asked, seed=n_asked))
            n_asked += 1
            turns.end(short)
            answer(model, 1)

    threads: list[threading.Thread] = []

    def has_read(n_done: int, n_rows: int) -> None:
        # The last rows are read before a question that arrives later.
        if n_rows - n_done <= SHORT_ROWS or (threads and threads[-1].is_alive()):
            return
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        while turns.record(long, n_rows - n_done):
            pass  # until the question has arrived
        with slot.working(pauses=True):
            turns.wait(long, lambda: False)

    long = QueuedPrompt(Prompt(LONG), "", len(LONG))
    turns.begin(long, lambda: False)
    with slot.working():
        sequence = model.engine.sequences[0]
        read(sequence.states, Prompt(LONG), sequence.rule, has_read)
        turns.end(long)
    for thread in threads:
        thread.join(30)
    assert n_asked >= 3
    np.testing.assert_array_equal(answer(model, 0), expected)


def test_copied_rows_change_no_bit(model):
    tokens = [*LONG[:1500], *prompt(50, seed=5)]
    expected = lone_answer(model, tokens)
    read_in(model, 0, LONG)
    model.engine.sequences[1].states.share(model.engine.sequences[0].states, Prompt(tokens))
    assert model.engine.sequences[1].cache.n_tokens == 1500
    read_in(model, 1, tokens)
    np.testing.assert_array_equal(answer(model, 1), expected)


def test_restored_rows_change_no_bit(model):
    tokens = [*LONG[:1500], *prompt(50, seed=5)]
    read_in(model, 0, LONG[:1500])
    state = model.engine.sequences[0].states.save()
    read_in(model, 1, prompt(40, seed=6))
    model.engine.sequences[2].states.restore(state)
    for index in (0, 2):
        read_in(model, index, tokens)
    np.testing.assert_array_equal(answer(model, 2), answer(model, 0))


@pytest.mark.parametrize("n_inserted", [40, -40])
def test_edited_rows_change_no_bit(model, n_inserted):
    """The same edit in another sequence, with a longer or a shorter prompt."""
    before = LONG[:1400]
    after = [
        *before[:300],
        *prompt(max(0, n_inserted), seed=9),
        *before[300 - min(0, n_inserted) :],
    ]
    found = []
    for index in (0, 2):
        read_in(model, index, before)
        read_in(model, index, after)
        assert model.engine.sequences[index].cache.rows.first_stale < len(after)
        found.append(answer(model, index))
        read_in(model, 1, prompt(70, seed=3))
    np.testing.assert_array_equal(found[1], found[0])


def test_failed_and_stopped_batches_leave_all_cells_in_place(model, monkeypatch):
    expected = lone_answer(model, LONG)
    read_in(model, 1, prompt(50, seed=2))
    run, cache = model.engine.context.batch.run, model.engine.sequences[0].cache
    with pytest.raises(StoppedError), stopped_by(lambda: cache.n_tokens > 900):
        read_in(model, 0, LONG)
    monkeypatch.setattr(model.engine.context.batch, "run", lambda *_: 1)
    with pytest.raises(PopError):
        model.engine.sequences[1].step(5)
    with pytest.raises(PopError):
        read_in(model, 0, LONG)
    monkeypatch.setattr(model.engine.context.batch, "run", run)
    read_in(model, 0, LONG)
    np.testing.assert_array_equal(answer(model, 0), expected)
    read_in(model, 2, LONG)
    np.testing.assert_array_equal(answer(model, 2), expected)


def test_unused_blocks_are_dropped(model):
    regions = model.engine.sequences[0].cache.slot.cells._regions
    read_in(model, 0, LONG)
    read_in(model, 1, LONG)
    assert regions._n_blocks == 7
    model.engine.sequences[0].cache.clear()
    assert regions._n_blocks == 7  # the last blocks are those of the other sequence
    model.engine.sequences[1].cache.clear()
    assert regions._n_blocks == 1


def test_all_sequences_can_be_full(model):
    tokens = prompt(4096, seed=4)
    for index in (2, 0, 1):
        read_in(model, index, tokens)
    assert [each.cache.slot.cells.end for each in model.engine.sequences] == [4096] * 3
