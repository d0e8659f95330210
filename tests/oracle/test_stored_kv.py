"""The K/V that pruning stores for context tokens, against a reference in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from converter.content import NewTensor
from converter.fit import FittedLayer, KvType, Projection, encode
from converter.format import FITTED, Calibration
from converter.plan import make_plan
from converter.rewrite import Fitted, convert
from converter.shape import read_shape
from support.kv_reference import Expected, Reference, Stored, normalised_states, parse_state
from support.oracle import Tokens, Trio, make_trio, random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 380
F32, F16 = 0, 1  # ggml's types of a cache
# Of values around 1 to 10: sums of F32 products, and RoPE's angles in F32.
CLOSE = 2e-3

# What a synthetic model is there for: biases, k_norm, RoPE and windows by layer, fused weights.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-rope-factors": {"rope_factors": True},
    "llama-moe": {"n_expert": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {},
    "gemma2": {},
    "gemma3": {},
    "gemma3-linear-scaling": {"rope_divisor": 8.0},
    "phi3": {},
    "phi3-rope-factors": {"rope_factors": True},
}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """F32 throughout: what remains is the order of additions. Boundary 3 of 8 layers."""
    folder = tmp_path_factory.mktemp(request.param)
    arch = request.param.split("-")[0]
    model = make_gguf(folder / "model.gguf", arch, type=Type.F32, **MODELS[request.param])
    return make_trio(model, folder, boundary=3)


@pytest.fixture
def job(unpatched_lib: Path) -> Job:
    return Job(model="", steps=(), lib=str(unpatched_lib), n_ctx=256, n_batch=256)


@pytest.mark.parametrize(("projection", "cache"), [("own", F32), ("fitted", F16)])
def test_context_rows_are_those_of_the_reference(
    tiny: Trio, projection: str, cache: int, tmp_path: Path, job: Job
) -> None:
    if projection == "fitted":
        tiny = replace(tiny, pruned=fit_at_random(tiny, tmp_path / "fitted.gguf", KvType.F32))
    tokens = random_tokens(64, N_VOCAB)
    job = replace(job, type_k=cache, type_v=cache)
    stored = prefilled(tiny, tokens, tmp_path, job)
    reference = Reference(tiny.pruned, normalised_states(tiny, tokens, job))
    windows = read_shape(tiny.original).swa_window
    for layer in range(tiny.boundary, len(windows)):
        found, wanted = context_rows(
            stored[layer], reference.layer(layer, swa=windows[layer] > 0), len(tokens)
        )
        # Windows of 16 tokens keep the last ones.
        assert len(found.pos) == (15 if windows[layer] else 63)
        for ours, theirs in ((found.k, wanted.k), (found.v, wanted.v)):
            # F16 has 11 binary digits.
            rounding = np.abs(theirs) * 2.0**-11 if cache == F16 else 0
            assert (np.abs(ours - theirs) <= CLOSE + rounding).all(), f"layer {layer}"
            assert np.abs(theirs).mean() > 100 * CLOSE


@pytest.mark.parametrize("projection", ["own", "fitted"])
@pytest.mark.parametrize(("name", "boundary"), [("smollm2", 26), ("gemma", 14)])
def test_a_real_model_differs_by_the_rounding_of_its_products(
    name: str,
    boundary: int,
    projection: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    job: Job,
) -> None:
    """Quantised weights take inputs of 8 bits: the error is that of such a rounding, no more."""
    trio = make_trio(request.getfixturevalue(name), tmp_path, boundary)
    if projection == "fitted":
        trio = replace(trio, pruned=fit_at_random(trio, tmp_path / "fitted.gguf", KvType.Q8_0))
    tokens = random_tokens(128, 40000)
    job = replace(job, type_k=F32, type_v=F32)
    stored = prefilled(trio, tokens, tmp_path, job)
    reference = Reference(trio.pruned, normalised_states(trio, tokens, job))
    windows = read_shape(trio.original).swa_window
    for layer in range(boundary, len(windows)):
        found, wanted = context_rows(
            stored[layer], reference.layer(layer, swa=windows[layer] > 0), len(tokens)
        )
        assert len(found.pos) == 127
        parts = ((found.k, wanted.k, wanted.k_noise), (found.v, wanted.v, wanted.v_noise))
        for ours, theirs, noise in parts:
            assert rms(ours - theirs) <= 1.3 * rms(noise), f"layer {layer}"
            assert rms(noise) < 0.05 * rms(theirs)


def prefilled(trio: Trio, tokens: Tokens, folder: Path, job: Job) -> dict[int, Stored]:
    """The patched library's state after a prefill whose last token alone is full."""
    state = folder / "state"
    steps = (
        Step("full_from", value=len(tokens) - 1),
        Step("decode", tokens=tokens),
        Step("counters", "counters"),
        Step("save", path=str(state)),
    )
    counters = run(replace(job, model=str(trio.pruned), steps=steps, lib=None))["counters"]
    np.testing.assert_array_equal(counters, [len(tokens) - 1, 1])
    return parse_state(state.read_bytes(), read_shape(trio.original).swa_window)


def context_rows(stored: Stored, expected: Expected, n_tokens: int) -> tuple[Stored, Expected]:
    """The rows of both that are stored and not full, in the order of the cells."""
    rows = stored.pos < n_tokens - 1
    pos = stored.pos[rows]
    wanted = Expected(
        expected.k[pos], expected.v[pos], expected.k_noise[pos], expected.v_noise[pos]
    )
    return Stored(pos, stored.k[rows], stored.v[rows]), wanted


def fit_at_random(trio: Trio, path: Path, kv_type: KvType) -> Path:
    """Fitted projections unlike any of the model's own; each layer's differ."""
    shape = read_shape(trio.original)
    plan = make_plan(shape, boundary=trio.boundary, sink_tokens=0, projection=FITTED)
    tensors: list[NewTensor] = []
    for layer in plan.fitted_layers:
        rng = np.random.default_rng(layer)
        n_out = shape.kv_macs[layer] // shape.n_embd // 2
        k, v = (
            Projection(
                rng.standard_normal((n_out, shape.n_embd), np.float32) / shape.n_embd**0.5,
                rng.standard_normal(n_out, np.float32),
            )
            for _ in range(2)
        )
        tensors += encode(FittedLayer(layer, k, v), kv_type)
    calibration = Calibration("random", "0" * 64, 0, 0.0, "none")
    convert(plan, trio.original, path, fitted=Fitted(calibration, tuple(tensors)))
    return path


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
