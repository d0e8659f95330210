"""Compare exact skipping with the unpatched library: equal logits, equal KV cache."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cpu import has_amx
from support.lora import make_lora
from support.oracle import distance, random_tokens
from support.pop_files import Keys, add_to
from support.raw import Job, Step, run
from support.shapes import read_shape
from support.shared_kv import DEFAULTS, make_shared, shapes

N_VOCAB = 380
Q8_0 = 8  # GGML_TYPE_Q8_0

MODELS: dict[str, dict[str, Any]] = {
    "gemma3n": {},
    "gemma3n-fused": {"fused_qkv": True},
    "gemma4": {},
    "gemma4-fused": {"fused_qkv": True},
    "gemma4-k-as-v": {"k_as_v": True},
    "gemma4-no-per-layer-inputs": {"n_per_layer": 0},
    "gemma4-moe": {"n_expert": 4},
    "gemma4-moe-fused": {"n_expert": 4, "fused_experts": True},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose products do not depend on the batch's shape."""
    arch = request.param.split("-")[0]
    folder = tmp_path_factory.mktemp(request.param)
    return make_shared(folder / "model.gguf", arch, **MODELS[request.param])


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one model per architecture, for tests that do not depend on its parts."""
    return make_shared(tmp_path_factory.mktemp(request.param) / "model.gguf", request.param)


@pytest.fixture
def job(job: Job) -> Job:
    return replace(job, repacked=not has_amx())


def counted(job: Job, model: Path, steps: tuple[Step, ...]) -> dict:
    """Return the patched library's results, followed by its row counts."""
    steps = (*steps, Step("exact", "exact"), Step("counters", "counters"))
    return run(replace(job, model=str(model), steps=steps, lib=None))


def both(job: Job, model: Path, steps: tuple[Step, ...]) -> tuple[dict, dict]:
    """Return both libraries' results; the steps must not save files."""
    return counted(job, model, steps), run(replace(job, model=str(model), steps=steps))


def rows(got: dict) -> tuple[int, ...]:
    """Return the counts of context, full and exact rows."""
    return tuple(int(n) for n in (*got["counters"], *got["exact"]))


def answered(tokens: tuple[int, ...], folder: Path, n_answer: int = 4) -> tuple[Step, ...]:
    """Return steps for a prefill and a few decodes, with the state saved after each phase."""
    n = len(tokens)
    return (
        Step("decode", "last", tokens=tokens),
        Step("save", path=str(folder / "prefilled")),
        *(Step("decode", f"{i}", tokens=(tokens[i],), pos=n + i) for i in range(n_answer)),
        Step("save", path=str(folder / "answered")),
    )


def compare(job: Job, model: Path, tokens: tuple[int, ...], folder: Path) -> tuple[dict, dict]:
    """Return both libraries' logits; require equal KV states, byte for byte."""
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir()
    theirs.mkdir()
    got = counted(job, model, answered(tokens, ours))
    want = run(replace(job, model=str(model), steps=answered(tokens, theirs)))
    assert (ours / "prefilled").read_bytes() == (theirs / "prefilled").read_bytes()
    assert (ours / "answered").read_bytes() == (theirs / "answered").read_bytes()
    return got, want


OPTIONS: dict[str, dict[str, Any]] = {
    "ubatch 64": {"n_ubatch": 64},
    "ubatch 256": {"n_ubatch": 256},
    "flash attention": {"flash_attn": True},
    "K in q8_0": {"type_k": Q8_0},
    "K and V in q8_0": {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0},
}
# Cache types and ubatch sizes are tested on models that store K/V in different ways. Fused weights,
# experts and omitted parts do not affect the stores.
STORES = ("gemma3n", "gemma4", "gemma4-k-as-v")
CASES = [
    pytest.param(model, options, id=f"{model}-{name}")
    for model in MODELS
    for name, options in OPTIONS.items()
    if model in STORES or name == "ubatch 64"
]


@pytest.mark.parametrize(("model", "options"), CASES, indirect=["model"])
def test_one_token_more_than_whole_ubatches_is_exact(
    options: dict, model: Path, tmp_path: Path, job: Job
) -> None:
    job = replace(job, **{"n_ubatch": 64} | options)
    n = max(128, job.n_ubatch)
    got, want = compare(job, model, random_tokens(n + 1, N_VOCAB), tmp_path)
    assert rows(got) == (0, 5, n)
    for name, logits in want.items():
        np.testing.assert_array_equal(got[name], logits)


@pytest.mark.parametrize(("model", "options"), CASES, indirect=["model"])
def test_rows_sharing_a_ubatch_have_unpatched_noise(
    options: dict, model: Path, tmp_path: Path, job: Job
) -> None:
    """All rows but one leave in the same ubatch; their K/V are equal bit for bit."""
    job, tokens = replace(job, **options), random_tokens(100, N_VOCAB)
    got, want = compare(job, model, tokens, tmp_path)
    assert rows(got) == (0, 5, 99)
    check_noise(got, want, replace(job, model=str(model)), Step("decode", "last", tokens=tokens))


def check_noise(got: dict, want: dict, job: Job, *steps: Step) -> None:
    """Limit the difference to that between ubatch sizes in the unpatched library."""
    others = [run(replace(job, steps=steps, n_ubatch=n_ubatch)) for n_ubatch in (41, 7)]
    for name in (step.name for step in steps):
        noise = [distance(*pair) for o in others for pair in zip(o[name], want[name], strict=True)]
        distances = [distance(*pair) for pair in zip(got[name], want[name], strict=True)]
        assert max(distances) <= max(noise), name


# Fused weights compute the same products, row by row.
@pytest.mark.parametrize("model", [name for name in MODELS if "fused" not in name], indirect=True)
@pytest.mark.parametrize("kv_unified", [True, False], ids=["one stream", "a stream each"])
def test_sequences_in_one_batch_equal_the_unpatched_library(
    kv_unified: bool, model: Path, tmp_path: Path, job: Job
) -> None:
    """Prompts of different lengths end in different ubatches; all rows of a stream remain."""
    lengths = (50, 83, 25, 31)
    prompts = [random_tokens(n, N_VOCAB, seed=n) for n in lengths]
    more = tuple((seq, 0, prompts[seq]) for seq in (1, 2, 3))
    job = replace(job, n_seq_max=4, n_ctx=2048, n_ubatch=128, kv_unified=kv_unified)

    decode = Step("decode", "logits", tokens=prompts[0], more=more)
    next_more = tuple((seq, lengths[seq], prompts[seq][:2]) for seq in (1, 2, 3))
    following = Step("decode", "next", tokens=prompts[0][:2], pos=lengths[0], more=next_more)

    def steps(who: str) -> tuple[Step, ...]:
        saves = (Step("save", path=str(tmp_path / f"{who}{s}"), seq=s) for s in range(4))
        return (decode, *saves, following)

    got = counted(job, model, steps("ours"))
    want = run(replace(job, model=str(model), steps=steps("theirs")))
    for seq in range(4):
        ours, theirs = (tmp_path / f"{who}{seq}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    n_context, n_full, n_exact = rows(got)
    assert (n_context, n_full + n_exact) == (0, sum(lengths) + 8)
    # Four last rows, and one row of the others for each ubatch in which a prompt ends.
    assert n_full == 8 if kv_unified else 8 <= n_full <= 20
    check_noise(got, want, replace(job, model=str(model)), decode, following)


def test_requested_logits_run_every_row_full(model: Path, job: Job) -> None:
    tokens = random_tokens(130, N_VOCAB)
    for op in ("decode", "embeddings"):
        got, want = both(job, model, (Step(op, "every", tokens=tokens, logits="all"),))
        assert rows(got) == (0, 130, 0)
        np.testing.assert_array_equal(got["every"], want["every"])


def test_mode_off_equals_the_unpatched_library(model: Path, job: Job) -> None:
    last = Step("decode", "last", tokens=random_tokens(130, N_VOCAB))
    got = counted(job, model, (Step("mode", value=0), last))
    assert rows(got) == (0, 130, 0)
    want = run(replace(job, model=str(model), steps=(last,)))
    np.testing.assert_array_equal(got["last"], want["last"])


@pytest.mark.skipif(sys.platform == "win32", reason="C++ names are others there")
def test_draft_head_reads_every_rows_state(tmp_path: Path, job: Job) -> None:
    """The states need all rows, although only the last one has logits; later rows leave again."""
    model = make_shared(tmp_path / "model.gguf", "gemma4")
    hidden = Step("hidden", "states", tokens=random_tokens(130, N_VOCAB))
    again = (Step("remove"), Step("decode", "last", tokens=hidden.tokens))
    got, want = both(job, model, (hidden, *again))
    assert rows(got) == (0, 130 + 1, 129)
    np.testing.assert_array_equal(got["states"], want["states"])


def test_evaluation_callback_sees_every_row(plain: Path, job: Job) -> None:
    """Tools that collect activations set such a callback."""
    step = (Step("decode", "last", tokens=random_tokens(40, N_VOCAB)),)
    assert rows(counted(job, plain, step)) == (0, 1, 39)
    assert rows(counted(replace(job, watched=True), plain, step)) == (0, 40, 0)


def test_batch_may_request_outputs_in_the_middle(plain: Path, tmp_path: Path, job: Job) -> None:
    tokens = random_tokens(150, N_VOCAB)
    parts = tuple((0, start, tokens[start : start + 25]) for start in range(25, 150, 25))
    six = Step("decode", "six", tokens=tokens[:25], more=parts)
    got, want = both(job, plain, (six,))
    assert rows(got) == (0, 6, 144)
    check_noise(got, want, replace(job, model=str(plain)), six)


@pytest.mark.parametrize("decodes", [False, True], ids=["prefills", "prefills and decodes"])
def test_alternating_prompts_never_reuse_a_wrong_graph(
    decodes: bool, plain: Path, job: Job
) -> None:
    """Each prefill, and the decode after it, equals that of a fresh context bit for bit.

    llama.cpp reuses a graph only directly after one of its shape, so a case without decodes exists.
    """
    tokens = random_tokens(40, N_VOCAB)
    calls = {
        "last": Step("decode", "now", tokens=tokens),
        "all": Step("decode", "now", tokens=tokens, logits="all"),
        "none": Step("decode", "now", tokens=tokens, logits="none"),
        "two": Step("decode", "now", tokens=tokens[:20], more=((0, 20, tokens[20:]),)),
        "two others": Step("decode", "now", tokens=tokens[:30], more=((0, 30, tokens[30:]),)),
        "three": Step(
            "decode", "now", tokens=tokens[:9], more=((0, 9, tokens[9:20]), (0, 20, tokens[20:]))
        ),
    }
    following = Step("decode", "next", tokens=tokens[:1], pos=40)
    keys = [(mode, name) for mode in (1, 0, 1) for name in (*calls, *reversed(calls), "last")]
    fresh = {
        (mode, name): counted(job, plain, (Step("mode", value=mode), call, following))
        for mode in (0, 1)
        for name, call in calls.items()
    }
    steps: list[Step] = []
    for turn, (mode, name) in enumerate(keys):
        steps += [Step("mode", value=mode), Step("remove")]
        steps.append(replace(calls[name], name=f"{turn} now"))
        steps += [replace(following, name=f"{turn} next")] if decodes else []
    got = counted(job, plain, tuple(steps))
    for turn, key in enumerate(keys):
        np.testing.assert_array_equal(got[f"{turn} now"], fresh[key]["now"])
        if decodes:
            np.testing.assert_array_equal(got[f"{turn} next"], fresh[key]["next"])


@pytest.mark.parametrize("patched_first", [True, False])
def test_either_library_restores_the_others_state(
    patched_first: bool, plain: Path, tmp_path: Path, job: Job
) -> None:
    tokens = random_tokens(300, N_VOCAB)
    state = Step("save", path=str(tmp_path / "state"))
    prefill = Step("decode", tokens=tokens[:-1], logits="none")
    last = Step("decode", "last", tokens=tokens[-1:], pos=299)
    ours, theirs = (replace(job, model=str(plain), lib=lib) for lib in (None, job.lib))
    first, second = (ours, theirs) if patched_first else (theirs, ours)
    straight = run(replace(first, steps=(prefill, state, last)))
    loaded = run(replace(second, steps=(replace(state, op="load"), last)))
    np.testing.assert_array_equal(straight["last"], loaded["last"])


def test_lora_adapter_equals_the_unpatched_library(plain: Path, tmp_path: Path, job: Job) -> None:
    """The adapters include layers without K/V, and the per-layer projections."""
    arch = "gemma3n" if "gemma3n" in str(plain) else "gemma4"
    parts = ("attn_q", "attn_k", "attn_v", "ffn_gate", "inp_gate", "proj")
    dims = {
        name: each
        for name, each in shapes(DEFAULTS[arch])
        if name.startswith("blk.") and name.split(".")[2] in parts
    }
    lora = make_lora(tmp_path / "lora.gguf", arch, dims)
    tokens = random_tokens(257, N_VOCAB)
    got, want = compare(replace(job, lora=str(lora), n_ubatch=128), plain, tokens, tmp_path)
    assert rows(got) == (0, 5, 256)
    for name, logits in want.items():
        np.testing.assert_array_equal(got[name], logits)
    without = run(replace(job, model=str(plain), steps=(Step("decode", "last", tokens=tokens),)))
    assert not np.array_equal(without["last"], want["last"])


def test_control_vector_equals_the_unpatched_library(plain: Path, tmp_path: Path, job: Job) -> None:
    base = DEFAULTS["gemma3n" if "gemma3n" in str(plain) else "gemma4"].base
    values = np.random.default_rng(0).standard_normal((base.n_layer - 1) * base.n_embd)
    job = replace(job, cvec=tuple(float(value) for value in values), n_ubatch=128)
    got, want = compare(job, plain, random_tokens(257, N_VOCAB), tmp_path)
    assert rows(got) == (0, 5, 256)
    for name, logits in want.items():
        np.testing.assert_array_equal(got[name], logits)


def test_image_in_the_prompt_equals_the_unpatched_library(
    plain: Path, tmp_path: Path, job: Job
) -> None:
    """An image is embeddings without tokens; its rows see later ones in layers with a window."""
    tokens = random_tokens(129, N_VOCAB)

    def steps(who: str) -> tuple[Step, ...]:
        return (
            Step("decode", tokens=tokens[:40], logits="none"),
            Step("image", value=60, pos=40),
            Step("save", path=str(tmp_path / who)),
            Step("decode", "last", tokens=tokens, pos=100),
        )

    got = counted(replace(job, n_ubatch=128), plain, steps("ours"))
    want = run(replace(job, model=str(plain), n_ubatch=128, steps=steps("theirs")))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert rows(got) == (0, 1, 40 + 60 + 128)
    np.testing.assert_array_equal(got["last"], want["last"])


def test_batch_of_one_token_runs_full(plain: Path, job: Job) -> None:
    got, want = both(job, plain, (Step("decode", "last", tokens=(5,)),))
    assert rows(got) == (0, 1, 0)
    np.testing.assert_array_equal(got["last"], want["last"])


def test_model_without_shared_layers_runs_all_layers(tmp_path: Path, job: Job) -> None:
    model = make_shared(tmp_path / "model.gguf", "gemma4", n_shared=0)
    got, want = both(job, model, (Step("decode", "last", tokens=random_tokens(50, N_VOCAB)),))
    assert rows(got) == (0, 50, 0)
    np.testing.assert_array_equal(got["last"], want["last"])
    with pytest.raises(RuntimeError, match="was refused"):
        counted(job, model, (Step("mode", value=1),))


def test_layers_without_kv_are_refused_as_boundary(plain: Path, tmp_path: Path, job: Job) -> None:
    n_layer = read_shape(plain).n_layer
    for step in (Step("mode", value=2), Step("boundary", value=n_layer - 1)):
        with pytest.raises(RuntimeError, match="was refused"):
            counted(job, plain, (step,))
    schedule = "F" * (n_layer - 1) + "S"
    keys: Keys = {"pop.version": 1, "pop.schedule": schedule, "pop.projection": "own"}
    wrong = add_to(plain, tmp_path / "wrong.gguf", keys)
    with pytest.raises(RuntimeError, match="store no K/V"):
        counted(job, wrong, ())
