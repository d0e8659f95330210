"""Compare the K/V that pruning stores for context tokens with a float64 reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pop_converter.fit.least_squares import KvType
from pop_converter.projection import Projection
from support.kv_reference import (
    F16,
    F32,
    Reference,
    context_rows,
    fit_at_random,
    normalised_states,
    prefilled,
)
from support.oracle import Trio, make_trio, random_tokens
from support.raw import Job
from support.shapes import read_shape
from support.synthetic import make_gguf

OWN, FITTED, WIDE = Projection

N_VOCAB = 380
# For values around 1 to 10, sums of F32 products and RoPE's angles in F32 have this error.
CLOSE = 2e-3

# The models differ in biases, k_norm, fused weights, and in RoPE and windows by layer.
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
    """Return a model in F32, so only summation order causes noise. Boundary 3 of 8 layers."""
    folder = tmp_path_factory.mktemp(request.param)
    arch = request.param.split("-")[0]
    model = make_gguf(folder / "model.gguf", arch, type=Type.F32, **MODELS[request.param])
    return make_trio(model, folder, boundary=3)


@pytest.fixture
def job(job: Job) -> Job:
    return replace(job, n_ctx=256, n_batch=256)


@pytest.mark.parametrize(("projection", "cache"), [(OWN, F32), (FITTED, F16), (WIDE, F32)])
def test_stored_context_rows_equal_the_reference(
    tiny: Trio, projection: Projection, cache: int, tmp_path: Path, job: Job
) -> None:
    if projection != OWN:
        path = fit_at_random(tiny, tmp_path / "fitted.gguf", KvType.F32, projection)
        tiny = replace(tiny, pruned=path)
    tokens = random_tokens(64, N_VOCAB)
    job = replace(job, type_k=cache, type_v=cache)
    stored = prefilled(tiny, tokens, tmp_path, job)
    reference = Reference(tiny.pruned, normalised_states(tiny, tokens, job))
    windows = read_shape(tiny.original).windows
    for layer in range(tiny.boundary, len(windows)):
        rows, expected = context_rows(
            stored[layer], reference.layer(layer, swa=windows[layer] > 0), len(tokens)
        )
        # Windows of 16 tokens retain only the last rows.
        assert len(rows.pos) == (15 if windows[layer] else 63)
        for ours, theirs in ((rows.k, expected.k), (rows.v, expected.v)):
            # F16 has 11 significant bits.
            rounding = np.abs(theirs) * 2.0**-11 if cache == F16 else 0
            assert (np.abs(ours - theirs) <= CLOSE + rounding).all(), f"layer {layer}"
            assert np.abs(theirs).mean() > 100 * CLOSE
