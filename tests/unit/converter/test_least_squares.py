"""Compare fits with direct weighted least squares; test their limits, errors and encoding."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import FitError, Gram, KvType
from pop_converter.fit.weights import KvProjection, Weights
from pop_converter.gguf.source import read_source
from support.synthetic import add_tensor, make_gguf

N, N_K, N_V, N_ROWS = 24, 6, 4, 400


def problem(seed: int = 0, gain: np.ndarray | None = None):
    """Return x [n, N + 1], y, token weights and slightly wrong own projections."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((N_ROWS, N), dtype=np.float32)
    x = fit.with_bias(fit.normalised(states, 1e-6))
    y = (x @ rng.standard_normal((N + 1, N_K + N_V)) + 0.1).astype(np.float32)
    weights = (0.2 + rng.random(N_ROWS)).astype(np.float32)
    gain = rng.uniform(0.5, 1.5, N) if gain is None else gain
    weight = rng.standard_normal((N_K + N_V, N), dtype=np.float32)
    bias = rng.standard_normal(N_K + N_V, dtype=np.float32)
    return x, y, weights, KvProjection(gain.astype(np.float32), weight, bias, N_K)


def summed(x, y, weights) -> Gram:
    gram = Gram.empty(N, {1: N_K + N_V})
    for rows in np.array_split(np.arange(len(x)), 3):
        gram.add(x[rows], {1: y[rows]}, weights[rows])
    return gram


def joined(layer: KvProjection) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight, layer.bias


def test_fit_equals_direct_weighted_least_squares():
    x, y, weights, own = problem()
    x64, d = x.astype(np.float64), np.diag(weights.astype(np.float64))
    start = np.vstack([own.gain[:, None] * own.weight.T, own.bias]).astype(np.float64)
    power = (x64.T @ d @ x64).diagonal()
    penalty = np.diag(power * np.append(np.full(N, fit.RIDGE), fit.BIAS_RIDGE))
    step = np.linalg.solve(x64.T @ d @ x64 + penalty, x64.T @ d @ (y - x64 @ start))
    expected = start + step
    weight, bias = joined(fit.fit_layer(1, summed(x, y, weights), own))
    np.testing.assert_allclose(weight.T * own.gain[:, None], expected[:-1], atol=2e-5)
    np.testing.assert_allclose(bias, expected[-1], atol=2e-5)


def test_exact_own_projections_are_kept_at_any_ridge():
    x, _, weights, own = problem()
    y = (x[:, :-1] * own.gain) @ own.weight.T + own.bias
    weight, bias = joined(fit.fit_layer(1, summed(x, y.astype(np.float32), weights), own))
    np.testing.assert_allclose(weight, own.weight, atol=1e-4)
    np.testing.assert_allclose(bias, own.bias, atol=1e-4)


@pytest.mark.parametrize("tiny", [0.0, 1e-12])
def test_input_without_gain_keeps_its_weights(tiny: float):
    gain = np.ones(N)
    gain[5] = tiny
    x, y, weights, own = problem(gain=gain)
    weight, _ = joined(fit.fit_layer(1, summed(x, y, weights), own))
    np.testing.assert_allclose(weight[:, 5], own.weight[:, 5], rtol=0.01, atol=0.01)


def test_constant_zero_input_is_supported():
    x, y, weights, own = problem()
    x[:, 7] = 0
    weight, _ = joined(fit.fit_layer(1, summed(x, y, weights), own))
    np.testing.assert_array_equal(weight[:, 7], own.weight[:, 7])


def test_non_finite_activations_are_refused():
    x, y, weights, own = problem()
    y[3, 2] = np.nan
    with pytest.raises(FitError, match="not finite"):
        fit.fit_layer(1, summed(x, y, weights), own)


def test_singular_gram_needs_a_ridge():
    x, y, weights, own = problem()
    same = np.repeat(x[:2], N_ROWS // 2, axis=0)
    gram = summed(same, y, weights)
    with pytest.raises(FitError, match="singular"):
        fit.fit_layer(1, gram, own, ridge=0)
    fit.fit_layer(1, gram, own)


def test_token_weights_are_bounded():
    mass = np.array([0, 1, 1, 2], np.float32)
    np.testing.assert_allclose(fit.token_weights(mass), [0.2, 1, 1, 1.8])
    np.testing.assert_array_equal(fit.token_weights(0 * mass), 1)
    peak = np.append(np.zeros(999, np.float32), np.float32(1))
    assert fit.token_weights(peak)[-1] == pytest.approx(0.2 + 0.8 * 50)


@pytest.mark.parametrize("kind", KvType)
def test_encoded_tensors_decode_to_the_weights(kind: KvType):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((8, 64), dtype=np.float32)
    biases = rng.standard_normal(16, dtype=np.float32)
    projection = KvProjection(np.ones(64, np.float32), np.concatenate([k, -k]), biases, 8)
    weight, bias, *_ = fit.encode(7, projection, kind)
    assert (weight.name, weight.dims) == ("blk.7.pop_attn_k.weight", (64, 8))
    raw = np.frombuffer(weight.data, np.uint8).reshape(8, -1)
    decoded = gguf.quants.dequantize(raw, kind.ggml)
    tolerance = {KvType.F32: 0, KvType.F16: 1e-2, KvType.Q8_0: 0.02, KvType.Q4_0: 0.5}[kind]
    np.testing.assert_allclose(decoded, k, atol=tolerance)
    np.testing.assert_array_equal(np.frombuffer(bias.data, np.float32), biases[:8])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
def test_own_projections_equal_the_files_tensors(arch: str, tmp_path: Path):
    path = make_gguf(tmp_path / "model.gguf", arch)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    own = Weights(read_source(path)).own_projection(3, 64, 64)
    if arch == "phi3":
        expected = tensors["blk.3.attn_qkv.weight"][-128:]
    else:
        expected = np.concatenate([tensors[f"blk.3.attn_{part}.weight"] for part in "kv"])
    np.testing.assert_array_equal(own.weight, expected.astype(np.float32))
    assert own.n_k == 64
    if arch == "qwen2":
        biases = [tensors[f"blk.3.attn_{part}.bias"] for part in "kv"]
        np.testing.assert_array_equal(own.bias, np.concatenate(biases))
    else:
        assert not own.bias.any()


def test_scale_tensor_multiplies_a_projection(tmp_path: Path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    plain = Weights(read_source(path)).own_projection(3, 64, 64).weight
    scaled = add_tensor(path, tmp_path / "scaled.gguf", "blk.3.attn_k.scale", np.array([0.25]))
    weight = Weights(read_source(scaled)).own_projection(3, 64, 64).weight
    np.testing.assert_array_equal(weight[:64], plain[:64] / 4)
    np.testing.assert_array_equal(weight[64:], plain[64:])
