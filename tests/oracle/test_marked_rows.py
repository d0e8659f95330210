"""Compare marked rows with rows that are full by position or ran in a deep pass."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.oracle import Trio, make_trio, random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 380
N_TOKENS = 300
N_UBATCH = 128
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-moe": {"n_expert": 4},
    "qwen3": {},
    "gemma3": {},
    "phi3": {},
}
SCATTERED = (3, 4, 5, 90, 130, 131, 200, 271)


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp(request.param)
    arch = request.param.split("-")[0]
    model = make_gguf(folder / "model.gguf", arch, type=Type.Q8_0, **MODELS[request.param])
    return make_trio(model, folder, boundary=3, n_sink=1)


def state(
    trio: Trio, path: Path, *before: Step, after: Sequence[Step] = (), **options: Any
) -> tuple[bytes, np.ndarray]:
    """Read a prompt between steps; return its state and its (context, full, marked) rows."""
    tokens = tuple(random_tokens(N_TOKENS, N_VOCAB))
    steps = [*before, Step("decode", tokens=tokens, logits="none"), *after]
    steps += [Step("save", path=str(path)), Step("marked", "marked"), Step("counters", "rows")]
    results = run(replace(Job(str(trio.pruned), steps=tuple(steps), n_ubatch=N_UBATCH), **options))
    return path.read_bytes(), np.concatenate([results["rows"], results["marked"]])


@pytest.mark.parametrize("flash_attn", [False, True])
def test_marked_rows_equal_rows_that_are_full_by_position(
    tiny: Trio, tmp_path: Path, flash_attn: bool
) -> None:
    first = 250
    marks = Step("deep_rows", tokens=tuple(range(first, N_TOKENS)))
    marked, rows = state(tiny, tmp_path / "marked", marks, flash_attn=flash_attn)
    tail = Step("full_from", value=first)
    by_position, _ = state(tiny, tmp_path / "tail", tail, flash_attn=flash_attn)
    assert rows.tolist() == [first - 1, N_TOKENS - first + 1, N_TOKENS - first]
    assert marked == by_position


def test_marked_rows_equal_rows_of_a_deep_pass(tiny: Trio, tmp_path: Path) -> None:
    marks = Step("deep_rows", tokens=SCATTERED)
    marked, rows = state(tiny, tmp_path / "marked", marks)
    assert rows.tolist() == [N_TOKENS - 1 - len(SCATTERED), 1 + len(SCATTERED), len(SCATTERED)]
    later = [
        Step("run_deep", tokens=tuple(row for row in (0, *SCATTERED) if row // N_UBATCH == i))
        for i in range(3)
    ]
    context = (Step("keep", value=1), Step("sink", value=0))
    passed, _ = state(tiny, tmp_path / "passed", *context, after=later)
    assert marked == passed
    assert marked != state(tiny, tmp_path / "plain")[0]


def test_marks_of_earlier_calls_are_replaced(tiny: Trio, tmp_path: Path) -> None:
    some = Step("deep_rows", tokens=SCATTERED)
    none = Step("deep_rows")
    assert state(tiny, tmp_path / "a", some, none)[0] == state(tiny, tmp_path / "b")[0]


def test_positions_must_ascend(tiny: Trio, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="llama_pop_set_deep_rows"):
        state(tiny, tmp_path / "a", Step("deep_rows", tokens=(5, 4)))
