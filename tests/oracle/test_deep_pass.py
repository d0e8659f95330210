"""Compare deep passes with the unpatched library: after them, the KV caches are equal."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.lora import OF_KV, make_lora
from support.oracle import Trio, make_trio, random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 380
N_UBATCH = 128
Q8_0 = 8  # GGML_TYPE_Q8_0
REFUSED = -1

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-moe": {"n_expert": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
}
CONTEXTS: dict[str, dict[str, Any]] = {
    "F16": {},
    "flash attention": {"flash_attn": True},
    "K in q8_0": {"type_k": Q8_0},
    "K and V in q8_0": {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True},
}
KEEP = Step("keep", value=1)


def make(folder: Path, name: str, **options: Any) -> Trio:
    arch = name.split("-")[0]
    model = make_gguf(
        folder / "model.gguf", arch, type=Type.Q8_0, **MODELS.get(name, {}), **options
    )
    return make_trio(model, folder, boundary=5, n_sink=1)


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return make(tmp_path_factory.mktemp("gemma3"), "gemma3")


@pytest.fixture
def job(job: Job) -> Job:
    return replace(job, n_ubatch=N_UBATCH)


def deepened(start: int, end: int, seq: int = 0) -> list[Step]:
    """Return deep passes over the rows, in the ubatches of a prompt."""
    pieces = [range(first, min(first + N_UBATCH, end)) for first in range(start, end, N_UBATCH)]
    return [Step("run_deep", tokens=tuple(piece), seq=seq, logits="none") for piece in pieces]


def read_in_full(job: Job, trio: Trio, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    return run(replace(job, model=str(trio.original), steps=tuple(steps)))


def read_pruned(job: Job, trio: Trio, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    counted = (KEEP, *steps, Step("deep", "n_deep"), Step("counters", "counters"))
    return run(replace(job, model=str(trio.pruned), steps=counted, lib=None))


def check_same_cache(
    job: Job, trio: Trio, folder: Path, ours: Sequence[Step], theirs: Sequence[Step], seq: int = 0
) -> None:
    """Compare a sequence's cache after `ours` on the pruned model and `theirs` on the full one."""
    mine, other = (Step("save", seq=seq, path=str(folder / name)) for name in ("ours", "theirs"))
    read_pruned(job, trio, [*ours, mine])
    read_in_full(job, trio, [*theirs, other])
    assert Path(mine.path).read_bytes() == Path(other.path).read_bytes()


@pytest.mark.parametrize("context", CONTEXTS)
def test_refilling_in_order_equals_the_full_model(
    tiny: Trio, context: str, tmp_path: Path, job: Job
) -> None:
    """Sink, tail, and rows that were run deep earlier are refilled together with the others."""
    job = replace(job, **CONTEXTS[context])
    tokens = random_tokens(300, N_VOCAB)
    ours, before, theirs = tmp_path / "ours", tmp_path / "before", tmp_path / "theirs"
    got = read_pruned(
        job,
        tiny,
        [
            Step("full_from", value=284),
            Step("decode", "pruned", tokens=tokens),
            Step("run_deep", tokens=(0, 7, 8, 9, 200, 201, *range(284, 300)), logits="last"),
            Step("save", path=str(before)),
            *deepened(0, 300)[:-1],
            Step("run_deep", "last", tokens=tuple(range(256, 300)), logits="last"),
            Step("save", path=str(ours)),
            Step("decode", "next", tokens=(5,), pos=300),
        ],
    )
    want = read_in_full(
        job,
        tiny,
        [
            Step("decode", "last", tokens=tokens),
            Step("save", path=str(theirs)),
            Step("decode", "next", tokens=(5,), pos=300),
        ],
    )
    assert before.read_bytes() != theirs.read_bytes()
    assert ours.read_bytes() == theirs.read_bytes()
    np.testing.assert_array_equal(got["last"], want["last"])
    np.testing.assert_array_equal(got["next"], want["next"])
    assert got["n_deep"].tolist() == [22 + 300]
    assert not np.array_equal(got["pruned"], want["last"])


def test_answer_rows_are_refilled_one_by_one(llama: Trio, tmp_path: Path, job: Job) -> None:
    tokens, answer = random_tokens(200, N_VOCAB), random_tokens(6, N_VOCAB, seed=1)
    steps = [Step("decode", tokens=(token,), pos=200 + i) for i, token in enumerate(answer)]
    again = [Step("run_deep", tokens=(200 + i,)) for i in range(6)]
    read = [Step("decode", tokens=tokens), *steps]
    check_same_cache(job, llama, tmp_path, [*read, *deepened(0, 200), *again], read)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["one stream", "a stream each"])
def test_refilling_works_next_to_another_sequence(
    gemma3: Trio, kv_unified: bool, tmp_path: Path, job: Job
) -> None:
    """The refilled sequence is the second one, so its cells come after the first one's."""
    job = replace(job, n_seq_max=2, kv_unified=kv_unified)
    first, second = random_tokens(150, N_VOCAB, seed=1), random_tokens(200, N_VOCAB, seed=2)
    both = [Step("decode", tokens=first), Step("decode", tokens=second, seq=1)]
    check_same_cache(job, gemma3, tmp_path, [*both, *deepened(0, 200, seq=1)], both, seq=1)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["one stream", "a stream each"])
def test_two_sequences_are_refilled_in_turn(
    llama: Trio, kv_unified: bool, tmp_path: Path, job: Job
) -> None:
    """Passes have one size, so their graphs differ only in the locations of the K/V."""
    job = replace(job, n_seq_max=2, kv_unified=kv_unified)
    both = [
        Step("decode", tokens=random_tokens(N_UBATCH, N_VOCAB, seed=1 + seq), seq=seq)
        for seq in (0, 1)
    ]
    deep = [*deepened(0, N_UBATCH), *deepened(0, N_UBATCH, seq=1)]
    for seq in (0, 1):
        check_same_cache(job, llama, tmp_path, [*both, *deep], both, seq)


def test_rows_that_reuse_cells_have_new_states(llama: Trio, tmp_path: Path, job: Job) -> None:
    tokens, others = random_tokens(200, N_VOCAB), random_tokens(80, N_VOCAB, seed=1)
    prompt = Step("decode", tokens=tokens[:128])
    other = Step("decode", tokens=others, pos=128)
    first = [prompt, Step("decode", tokens=tokens[128:], pos=128), Step("remove", pos=128)]
    deep = [*deepened(0, 128), *deepened(128, 208)]
    check_same_cache(job, llama, tmp_path, [*first, other, *deep], [prompt, other])


def test_copied_sequence_shares_its_states(llama: Trio, tmp_path: Path, job: Job) -> None:
    job = replace(job, n_seq_max=2, kv_unified=True)
    steps = [Step("decode", tokens=random_tokens(200, N_VOCAB)), Step("copy", value=1)]
    check_same_cache(job, llama, tmp_path, [*steps, *deepened(0, 200, seq=1)], steps, seq=1)


def test_deep_pass_applies_a_lora_adapter(llama: Trio, tmp_path: Path, job: Job) -> None:
    job = replace(job, lora=str(make_lora(tmp_path / "lora.gguf", "llama", OF_KV)))
    prompt = Step("decode", tokens=random_tokens(200, N_VOCAB))
    check_same_cache(job, llama, tmp_path, [prompt, *deepened(0, 200)], [prompt])


def test_deep_pass_without_logits_leaves_the_last_logits(llama: Trio, job: Job) -> None:
    prompt = Step("decode", "before", tokens=random_tokens(200, N_VOCAB))
    deep = deepened(0, 200)
    got = read_pruned(job, llama, [prompt, *deep, Step("logits", "after")])
    np.testing.assert_array_equal(got["after"], got["before"])


REFUSALS: dict[str, tuple[Step, ...]] = {
    "dropped": (
        Step("keep"),
        KEEP,
        Step("run_deep", tokens=(5,), value=REFUSED),
    ),
    "removed": (Step("remove", pos=5), Step("run_deep", tokens=(5,), value=REFUSED)),
    "another boundary": (
        Step("boundary", value=4),
        Step("run_deep", tokens=(5,), value=REFUSED),
        Step("boundary", value=0),
        Step("run_deep", tokens=(5,)),
    ),
    "a loaded state": (
        Step("save", path="{folder}/state"),
        Step("load", path="{folder}/state"),
        Step("run_deep", tokens=(5,), value=REFUSED),
    ),
    "no row": (Step("run_deep", value=REFUSED),),
    "more rows than a ubatch": (Step("run_deep", tokens=tuple(range(129)), value=REFUSED),),
    "descending": (Step("run_deep", tokens=(6, 5), value=REFUSED),),
    "twice the same": (Step("run_deep", tokens=(5, 5), value=REFUSED),),
    "a row that is not there": (Step("run_deep", tokens=(200,), value=REFUSED),),
    "no such sequence": (Step("run_deep", tokens=(5,), seq=7, value=REFUSED),),
    "rows see later ones": (Step("causal"), Step("run_deep", tokens=(5,), value=REFUSED)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_impossible_deep_passes_are_refused(
    llama: Trio, case: str, tmp_path: Path, job: Job
) -> None:
    steps = [
        replace(step, path=step.path.format(folder=tmp_path), name="") for step in REFUSALS[case]
    ]
    prompt = Step("decode", tokens=random_tokens(200, N_VOCAB))
    read_pruned(job, llama, [prompt, *steps])


def test_rows_outside_the_window_are_refused(gemma3: Trio, job: Job) -> None:
    prompt = Step("decode", tokens=random_tokens(1500, N_VOCAB))
    refused = Step("run_deep", tokens=(700,), value=REFUSED)
    read_pruned(replace(job, swa_full=False), gemma3, [prompt, refused])
    read_pruned(job, gemma3, [prompt, replace(refused, value=0)])


def test_snapshots_change_no_result(tiny: Trio, tmp_path: Path, job: Job) -> None:
    tokens = random_tokens(300, N_VOCAB)
    results = []
    for name, first in {"off": (), "on": (KEEP,)}.items():
        path = tmp_path / name
        steps = (
            *first,
            Step("full_from", value=280),
            Step("decode", "logits", tokens=tokens),
            Step("save", path=str(path)),
        )
        got = run(replace(job, model=str(tiny.pruned), steps=steps, lib=None))
        results.append((got["logits"].tobytes(), path.read_bytes()))
    assert results[0] == results[1]
