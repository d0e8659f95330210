"""Compare moved rows with the unpatched library's. Test the other rows and a move's memory use."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import RopeScalingType

from support import recipes
from support.architectures import MORE_KEYS
from support.oracle import Q8_0, random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 120  # smaller than each model's vocabulary
N_UBATCH = 64  # the backend rotates up to this many rows at once
N_REMOVED = 9
# Rows of two sequences alternate in runs of this length.
N_RUN = 50
FIRST, SECOND = N_RUN + 20, 2 * N_RUN + 30  # within a run, and within the rows rotated at once
OLD, OTHER = random_tokens(300, N_VOCAB), random_tokens(300, N_VOCAB, seed=1)
SYNTHETIC = ("llama", "gemma3", "qwen3", "phi3")
RECIPES = ("gptneox", "deepseek2")  # partial RoPE, and MLA
UNSHIFTED = ("llama", "phi3", "deepseek2")  # models whose quantized K llama.cpp cannot shift
Q4_0 = 2
CACHES: dict[str, dict[str, Any]] = {
    "F16": {},
    "q8_0": {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0},
    "q4_0": {"flash_attn": True, "type_k": Q4_0, "type_v": Q4_0},
}
# A context with many cells, in which only the last rows move.
N_CELLS, N_KEPT, N_MOVED = 32768, 30000, 100
MAX_GROWTH = 4 << 20

streams = pytest.mark.parametrize("kv_unified", [True, False], ids=["one stream", "a stream each"])


def moved(start: int) -> Step:
    """Return a step that removes N_REMOVED rows at `start` and N_REMOVED rows at SECOND."""
    ends = start + N_REMOVED, SECOND + 2 * N_REMOVED
    rows = (*range(ends[0], SECOND + N_REMOVED), *range(ends[1], len(OLD)))
    return Step("move", tokens=tuple(OLD[row] for row in rows), rows=rows, pos=start)


def state_after(job: Job, path: Path, steps: tuple[Step, ...]) -> bytes:
    run(replace(job, steps=(*steps, Step("save", path=str(path)))))
    return path.read_bytes()


def assert_equals_a_shift(
    job: Job, steps: tuple[Step, ...], start: int, tmp_path: Path, unpatched_lib: Path
) -> None:
    """Compare a sequence moved by our code with one shifted by the unpatched library.

    `steps` decode the sequence. `start`: first removed row.
    """
    shifts = [Step("shift", pos=at + N_REMOVED, value=-N_REMOVED) for at in (start, SECOND)]
    # llama.cpp rotates shifted rows before it decodes the next token.
    end = len(OLD) - 2 * N_REMOVED
    then = (Step("decode", tokens=OLD[:1], pos=end), Step("remove", pos=end))
    state = state_after(job, tmp_path / "moved", (*steps, moved(start), *then))
    job = replace(job, lib=str(unpatched_lib))
    assert state == state_after(job, tmp_path / "shifted", (*steps, *shifts, *then))


@pytest.fixture(params=(*SYNTHETIC, *RECIPES))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in SYNTHETIC:
        return make_gguf(tmp_path / f"{request.param}.gguf", request.param)
    name = next((name for name in recipes.names() if name.arch == request.param), None)
    if name is None:
        pytest.skip("the recipes are not built")
    path = tmp_path / f"{request.param}.gguf"
    return recipes.make(name, path, MORE_KEYS.get(name.arch, ()))


@pytest.mark.parametrize("cache", CACHES)
def test_moved_rows_equal_rows_shifted_by_the_unpatched_library(
    model: Path, cache: str, tmp_path: Path, unpatched_lib: Path
) -> None:
    if cache != "F16" and model.stem in UNSHIFTED:
        pytest.skip("llama.cpp cannot shift this model's quantized K cache")
    job = Job(str(model), (), n_ubatch=N_UBATCH, **CACHES[cache])
    assert_equals_a_shift(job, (Step("decode", tokens=OLD),), 0, tmp_path, unpatched_lib)


def alternating(model: Path, cache: str, kv_unified: bool) -> tuple[Job, tuple[Step, ...]]:
    """Return a job of two sequences, and steps that decode them in turn."""
    starts = range(0, len(OLD), N_RUN)
    steps = [
        Step("decode", tokens=OLD[at : at + N_RUN], pos=at, more=((1, at, OTHER[at : at + N_RUN]),))
        for at in starts
    ]
    job = Job(str(model), (), n_ctx=4096, n_ubatch=N_UBATCH, n_seq_max=2, **CACHES[cache])
    return replace(job, kv_unified=kv_unified), tuple(steps)


@streams
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_rows_move_among_another_sequences_rows(
    arch: str, kv_unified: bool, tmp_path: Path, unpatched_lib: Path
) -> None:
    model = make_gguf(tmp_path / "model.gguf", arch)
    job, steps = alternating(model, "F16", kv_unified)
    assert_equals_a_shift(job, steps, FIRST, tmp_path, unpatched_lib)


@streams
@pytest.mark.parametrize(
    ("arch", "cache"), [("llama", "F16"), ("gemma3", "F16"), ("qwen3", "q4_0")]
)
def test_move_changes_no_other_row(arch: str, cache: str, kv_unified: bool, tmp_path: Path) -> None:
    """With YaRN, llama.cpp's rotation scales K even if the angle is 0."""
    scaling = {"rope_scaling": RopeScalingType.YARN, "rope_divisor": 4.0}
    model = make_gguf(tmp_path / "model.gguf", arch, **scaling)
    job, steps = alternating(model, cache, kv_unified)
    cut = Step("remove", pos=FIRST)
    kept, others = [], []
    for name, more in (("before", ()), ("after", (moved(FIRST),))):
        other = tmp_path / f"other-{name}"
        more = (*steps, *more, Step("save", path=str(other), seq=1), cut)
        kept.append(state_after(job, tmp_path / name, more))
        others.append(other.read_bytes())
    assert kept[0] == kept[1]
    assert others[0] == others[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak memory")
@pytest.mark.parametrize(("arch", "cache"), [("llama", "F16"), ("gemma3", "q8_0")])
def test_memory_of_a_move_does_not_depend_on_the_other_rows(
    arch: str, cache: str, tmp_path: Path
) -> None:
    model = make_gguf(tmp_path / "model.gguf", arch)
    job = Job(str(model), (), n_ctx=N_CELLS, n_ubatch=N_UBATCH, **CACHES[cache])
    n_rows = N_KEPT + N_MOVED
    fill = Step("move", tokens=(0,) * n_rows, rows=(-1,) * n_rows)
    rows = tuple(range(N_KEPT + 1, n_rows))
    move = Step("move", tokens=(0,) * len(rows), rows=rows, pos=N_KEPT)
    peaks = (Step("peak"), Step("peak", "before"), move, Step("peak", "after"))
    results = run(replace(job, steps=(Step("decode", tokens=OLD), fill, *peaks)))
    assert results["after"] - results["before"] < MAX_GROWTH
