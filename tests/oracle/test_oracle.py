"""Compare the patched library with the oracle and with the unpatched library."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.lora import OF_KV, make_lora
from support.oracle import (
    EXACT,
    Trio,
    check_exact,
    expected,
    make_trio,
    mean_distance,
    pruned,
    random_tokens,
    unpatched_noise,
)
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 380

SYNTHETIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-moe": {"n_expert": 4},
    "llama-rope-factors": {"rope_factors": True},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {},
    "qwen2vl": {},
    "qwen3vl": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
    "phi3-rope-factors": {"rope_factors": True},
}


@pytest.fixture(scope="module", params=SYNTHETIC)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Return a model with weights whose products do not depend on the batch's shape."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    arch = name.split("-")[0]
    model = make_gguf(folder / "model.gguf", arch, type=Type.Q8_0, **SYNTHETIC[name])
    return make_trio(model, folder, boundary=5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp("llama")
    model = make_gguf(folder / "model.gguf", "llama", type=Type.Q8_0)
    return make_trio(model, folder, boundary=5)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_tiny_models_equal_the_oracle(tiny: Trio, options: dict, tmp_path: Path, job: Job) -> None:
    check_exact(tiny, 257, N_VOCAB, tmp_path, replace(job, **{"n_ubatch": 256} | options))


def test_full_and_context_rows_share_a_ubatch(llama: Trio, tmp_path: Path, job: Job) -> None:
    check_exact(llama, 300, N_VOCAB, tmp_path, job)


def test_lora_adapter_equals_the_oracle(llama: Trio, tmp_path: Path, job: Job) -> None:
    lora = make_lora(tmp_path / "lora.gguf", "llama", OF_KV)
    with_lora = replace(job, lora=str(lora))
    check_exact(llama, 300, N_VOCAB, tmp_path, with_lora)
    prompts = [random_tokens(300, N_VOCAB)]
    plain, _ = pruned(llama, prompts, 1, job)
    changed, _ = pruned(llama, prompts, 1, with_lora)
    assert not np.array_equal(plain, changed)


def test_control_vector_equals_the_oracle(llama: Trio, tmp_path: Path, job: Job) -> None:
    kept = np.random.default_rng(0).standard_normal(4 * 128)  # layers 1 to 4 of 8, boundary 5
    cvec = tuple(float(value) for value in np.concatenate([kept, np.zeros(3 * 128)]))
    check_exact(llama, 300, N_VOCAB, tmp_path, replace(job, cvec=cvec))


@pytest.mark.parametrize("kv_unified", [True, False], ids=["one stream", "a stream each"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sequences_in_one_batch_equal_the_oracle(
    arch: str, kv_unified: bool, tmp_path: Path, job: Job
) -> None:
    trio = make_trio(make_gguf(tmp_path / "model.gguf", arch), tmp_path, boundary=5, n_sink=1)
    lengths = (50, 83, 25, 31)
    prompts = [random_tokens(n, N_VOCAB, seed=n) for n in lengths]
    more = tuple((seq, 0, prompts[seq]) for seq in (1, 2, 3))
    steps = (
        *(Step("full_from", seq=seq, value=n - 16) for seq, n in enumerate(lengths)),
        Step("decode", "logits", tokens=prompts[0], more=more),
        Step("counters", "counters"),
    )
    many = replace(job, n_seq_max=4, n_ctx=2048, n_ubatch=128, kv_unified=kv_unified)
    got = run(replace(many, model=str(trio.pruned), steps=steps, lib=None))
    np.testing.assert_array_equal(got["counters"], [sum(lengths) - 4 * 17, 4 * 17])
    want = expected(trio, prompts, 16, tmp_path, job)
    noise = unpatched_noise(want, trio, prompts, 16, tmp_path, job)
    assert mean_distance(got["logits"], want) <= noise


def test_all_logits_and_mode_off_equal_the_unpatched_library(tiny: Trio, job: Job) -> None:
    tokens = random_tokens(300, N_VOCAB)
    every = Step("decode", "every", tokens=tokens, logits="all")
    want = run(replace(job, model=str(tiny.original), steps=(every,)))
    steps = (every, Step("counters", "counters"))
    got = run(replace(job, model=str(tiny.pruned), steps=steps, lib=None))
    np.testing.assert_array_equal(got["every"], want["every"])
    np.testing.assert_array_equal(got["counters"], [0, 300])

    last = Step("decode", "last", tokens=tokens)
    want = run(replace(job, model=str(tiny.original), steps=(last,)))
    off = run(replace(job, model=str(tiny.pruned), steps=(Step("mode", value=0), last), lib=None))
    np.testing.assert_array_equal(off["last"], want["last"])


def test_mode_and_boundary_take_effect_on_the_next_decode(
    llama: Trio, job: Job, tmp_path: Path
) -> None:
    """Modes and boundaries alternate on one context, so a reused graph would be noticed."""
    tokens = random_tokens(300, N_VOCAB)

    def again(name: str) -> tuple[Step, ...]:
        return (Step("remove"), Step("decode", name, tokens=tokens))

    steps = (
        *again("pruned"),
        *again("pruned again"),
        Step("mode", value=0),
        *again("full"),
        Step("mode", value=1),
        Step("boundary", value=3),
        *again("deeper"),
        Step("boundary", value=0),
        *again("back"),
        Step("mode", value=2),
        *again("always"),
        Step("counters"),
    )
    got = run(replace(job, model=str(llama.pruned), steps=steps, lib=None))
    full = run(replace(job, model=str(llama.original), steps=again("full")))["full"]
    deeper = expected(make_trio(llama.original, tmp_path, boundary=3), [tokens], 1, tmp_path, job)
    np.testing.assert_array_equal(got["full"], full)
    np.testing.assert_array_equal(got["pruned"], got["pruned again"])
    np.testing.assert_array_equal(got["pruned"], got["back"])
    np.testing.assert_array_equal(got["deeper"], deeper)
    assert not np.array_equal(got["always"], got["pruned"])


def test_mode_always_gives_the_boundary_states_logits(llama: Trio, job: Job) -> None:
    """Silent deep layers equal omitted layers."""
    tokens = random_tokens(300, N_VOCAB)
    last = Step("decode", "last", tokens=tokens)
    want = run(replace(job, model=str(llama.silent), steps=(last,)))["last"]
    steps = (Step("mode", value=2), last, Step("counters", "counters"))
    got = run(replace(job, model=str(llama.pruned), steps=steps, lib=None))
    np.testing.assert_array_equal(got["last"], want)
    np.testing.assert_array_equal(got["counters"], [300, 0])


def test_restored_state_equals_the_saved_one(llama: Trio, job: Job, tmp_path: Path) -> None:
    tokens = random_tokens(300, N_VOCAB)
    state = str(tmp_path / "kept")
    prefill = Step("decode", tokens=tokens[:-1], logits="none")
    last = Step("decode", "last", tokens=tokens[-1:], pos=299)
    straight = (prefill, Step("save", path=state), last)
    loaded = (Step("load", path=state), last)
    first = run(replace(job, model=str(llama.pruned), steps=straight, lib=None))
    second = run(replace(job, model=str(llama.pruned), steps=loaded, lib=None))
    unpatched = run(replace(job, model=str(llama.original), steps=loaded))
    np.testing.assert_array_equal(first["last"], second["last"])
    np.testing.assert_array_equal(first["last"], unpatched["last"])


def test_context_shift_equals_the_oracle(llama: Trio, job: Job, tmp_path: Path) -> None:
    tokens = random_tokens(300, N_VOCAB)
    shift = Step("shift", pos=100, value=-60)
    last = Step("decode", "last", tokens=tokens[-1:], pos=299 - 60)
    prefill = Step("decode", tokens=tokens[:-1], logits="none")
    state = str(tmp_path / "state")
    run(replace(job, model=str(llama.silent), steps=(prefill, Step("save", path=state))))
    want = run(
        replace(job, model=str(llama.original), steps=(Step("load", path=state), shift, last))
    )
    got = run(replace(job, model=str(llama.pruned), steps=(prefill, shift, last), lib=None))
    np.testing.assert_array_equal(got["last"], want["last"])
