"""The child processes that the oracle's jobs run in: one that dies, fails, or has an old model."""

from pathlib import Path

import numpy as np
import pytest

from support.raw import DiedError, Job, Step, run
from support.synthetic import make_gguf

TOKENS = tuple(range(3, 67))
LAST = Step("decode", "last", tokens=TOKENS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "model.gguf", "llama")


def test_a_child_that_dies_says_why_and_has_a_successor(model: Path) -> None:
    want = run(Job(str(model), (LAST,)))["last"]
    with pytest.raises(DiedError, match=r"GGML_ASSERT\(.*n_batch"):
        run(Job(str(model), (LAST,), n_batch=32))
    np.testing.assert_array_equal(run(Job(str(model), (LAST,)))["last"], want)


def test_a_job_that_fails_shows_its_own_log_and_leaves_the_child_in_order(model: Path) -> None:
    want = run(Job(str(model), (LAST,)))["last"]
    with pytest.raises(RuntimeError, match="data is not within the file bounds"):
        short = model.with_name("short.gguf")
        short.write_bytes(model.read_bytes()[:200_000])
        run(Job(str(short), (LAST,)))
    with pytest.raises(RuntimeError, match="was refused") as failed:
        run(Job(str(model), (Step("mode", value=3),)))
    assert "file bounds" not in str(failed.value)
    np.testing.assert_array_equal(run(Job(str(model), (LAST,)))["last"], want)


def test_each_job_has_a_context_of_its_own(model: Path) -> None:
    pruning = (Step("boundary", value=4), Step("mode", value=1), LAST, Step("counters", "counters"))
    pruned = run(Job(str(model), pruning))
    np.testing.assert_array_equal(pruned["counters"], [62, 2])
    full = run(Job(str(model), (LAST, Step("counters", "counters"))))
    np.testing.assert_array_equal(full["counters"], [0, 64])
    assert not np.array_equal(full["last"], pruned["last"])


def test_a_file_that_was_replaced_is_opened_anew(model: Path) -> None:
    before = run(Job(str(model), (LAST,)))["last"]
    make_gguf(model, "llama", seed=1)
    assert not np.array_equal(run(Job(str(model), (LAST,)))["last"], before)
