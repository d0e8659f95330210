"""Compare small real models with the oracle: quantised weights, windows, a tied output."""

from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from llama_cpp import Llama

from pop_converter.fit.least_squares import KvType
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from support.converted import convert_default, paired
from support.kv_reference import (
    F32,
    Reference,
    context_rows,
    fit_at_random,
    normalised_states,
    prefilled,
    rms,
)
from support.oracle import (
    EXACT,
    Tokens,
    Trio,
    assert_same_logits,
    check_exact,
    expected,
    make_trio,
    mean_distance,
    pruned,
    random_tokens,
    unpatched_noise,
)
from support.raw import Job
from support.shapes import read_shape
from support.sidecars import require_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    name = request.param
    boundary = {"smollm2": 20, "gemma": 12}[name]
    return make_trio(request.getfixturevalue(name), tmp_path_factory.mktemp(name), boundary)


@pytest.mark.parametrize(
    ("real", "options"),
    [("smollm2", EXACT["K in q8_0"]), ("gemma", {})],
    ids=["smollm2, K in q8_0", "gemma"],
    indirect=["real"],
)
def test_real_models_equal_the_oracle(real: Trio, options: dict, tmp_path: Path, job: Job) -> None:
    check_exact(real, 129, 40000, tmp_path, replace(job, **{"n_ubatch": 64} | options))


@pytest.fixture(scope="module")
def sunk(real: Trio, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Return a model with a sink token, which changes only the keys of the file."""
    path = tmp_path_factory.mktemp("sunk") / "pruned.gguf"
    plan = make_plan(read_shape(real.original), boundary=real.boundary, sink_tokens=1)
    convert(plan, real.original, path)
    return replace(real, pruned=path, n_sink=1)


def test_sink_and_tail_are_within_the_unpatched_noise(sunk: Trio, tmp_path: Path, job: Job) -> None:
    [tokens] = prompts = prose(sunk.original, n_prompts=1, n_tokens=72)
    want = expected(sunk, prompts, 16, tmp_path, job)
    noise = unpatched_noise(want, sunk, prompts, 16, tmp_path, job)
    for variant in (job, replace(job, n_ubatch=48)):
        logits, counters = pruned(sunk, prompts, 16, variant)
        assert counters == (len(tokens) - 17, 17)
        reference = want if variant is job else expected(sunk, prompts, 16, tmp_path, variant)
        assert mean_distance(logits, reference) <= noise


def prose(model: Path, n_prompts: int, n_tokens: int) -> list[Tokens]:
    """Return consecutive windows of Python's documentation."""
    vocab = Llama(str(model), vocab_only=True, verbose=False)
    text = "\n".join(topics[name] for name in sorted(topics))[: 10 * n_prompts * n_tokens]
    tokens = vocab.tokenize(text.encode())
    return [tuple(tokens[i * n_tokens : (i + 1) * n_tokens]) for i in range(n_prompts)]


@pytest.fixture(scope="module")
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Return a model with few skipped layers, so the reference is fast."""
    boundary = {"smollm2": 26, "gemma": 14}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return make_trio(request.getfixturevalue(request.param), folder, boundary)


@pytest.mark.parametrize(
    ("deep", "projection"), [("smollm2", "fitted"), ("gemma", "own")], indirect=["deep"]
)
def test_stored_kv_of_a_real_model_differs_only_by_rounding(
    deep: Trio, projection: str, tmp_path: Path, job: Job
) -> None:
    """Products of quantised weights round their inputs to 8 bits; the error has that size."""
    trio = deep
    if projection == "fitted":
        trio = replace(trio, pruned=fit_at_random(trio, tmp_path / "fitted.gguf", KvType.Q8_0))
    tokens = random_tokens(64, 40000)
    job = replace(job, type_k=F32, type_v=F32)
    stored = prefilled(trio, tokens, tmp_path, job)
    reference = Reference(trio.pruned, normalised_states(trio, tokens, job))
    windows = read_shape(trio.original).windows
    for layer in range(trio.boundary, len(windows)):
        rows, reference_rows = context_rows(
            stored[layer], reference.layer(layer, swa=windows[layer] > 0), len(tokens)
        )
        assert len(rows.pos) == 63
        parts = (
            (rows.k, reference_rows.k, reference_rows.k_noise),
            (rows.v, reference_rows.v, reference_rows.v_noise),
        )
        for ours, theirs, noise in parts:
            assert rms(ours - theirs) <= 1.3 * rms(noise), f"layer {layer}"
            assert rms(noise) < 0.05 * rms(theirs)


def test_smollm2_with_a_sidecar_equals_the_single_file(smollm2, tmp_path):
    require_same(paired(smollm2, tmp_path, "fitted"), tmp_path, random_tokens(64, 40000))


def test_unpatched_library_runs_a_converted_model_like_its_source(smollm2, tmp_path, unpatched_lib):
    target = tmp_path / "out.gguf"
    convert_default(smollm2, target)
    assert_same_logits(smollm2, target, unpatched_lib)
