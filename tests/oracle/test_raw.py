"""Child processes of the oracle: crashes, failed jobs, replaced models."""

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


def test_crashed_child_reports_why_and_is_replaced(model: Path) -> None:
    want = run(Job(str(model), (LAST,)))["last"]
    with pytest.raises(DiedError, match=r"GGML_ASSERT\(.*n_batch"):
        run(Job(str(model), (LAST,), n_batch=32))
    np.testing.assert_array_equal(run(Job(str(model), (LAST,)))["last"], want)


def test_failed_job_shows_only_its_log_and_the_child_survives(model: Path) -> None:
    want = run(Job(str(model), (LAST,)))["last"]
    with pytest.raises(RuntimeError, match="data is not within the file bounds"):
        short = model.with_name("short.gguf")
        short.write_bytes(model.read_bytes()[:200_000])
        run(Job(str(short), (LAST,)))
    with pytest.raises(RuntimeError, match="was refused") as failed:
        run(Job(str(model), (Step("mode", value=3),)))
    assert "file bounds" not in str(failed.value)
    np.testing.assert_array_equal(run(Job(str(model), (LAST,)))["last"], want)


def test_each_job_has_its_context(model: Path) -> None:
    pruning = (Step("boundary", value=4), Step("mode", value=1), LAST, Step("counters", "counters"))
    pruned = run(Job(str(model), pruning))
    np.testing.assert_array_equal(pruned["counters"], [62, 2])
    full = run(Job(str(model), (LAST, Step("counters", "counters"))))
    np.testing.assert_array_equal(full["counters"], [0, 64])
    assert not np.array_equal(full["last"], pruned["last"])


def test_replaced_file_is_reopened(model: Path) -> None:
    before = run(Job(str(model), (LAST,)))["last"]
    make_gguf(model, "llama", seed=1)
    assert not np.array_equal(run(Job(str(model), (LAST,)))["last"], before)
