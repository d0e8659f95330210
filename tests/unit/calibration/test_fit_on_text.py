"""Test calibration in one or several passes, its stops, its memory and its tensors."""

from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import StoppedError
from pop_base.progress import Watch
from pop_converter.fit import least_squares as fit
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import read_source
from pop_converter.popfile.rewrite import Fitted, convert
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import plan_needs
from pop_local.calibration.texts import N_WINDOW, given_text
from support.calibrating import (
    BOUNDARY,
    N_TOKENS,
    WEIGHING,
    fitted,
    fitted_at,
    kv,
    planned,
    recorded,
    settings,
    stopped_at,
    weights,
)
from support.shapes import read_pop_meta
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(llama: Path, letters: Path) -> Fitted:
    """Return a plain fit of the model from a single pass."""
    return fitted(llama, settings(letters))


@pytest.fixture(scope="module")
def apart(llama: Path, letters: Path) -> list[Fitted]:
    """Return separate fits at two boundaries."""
    return [fitted_at((boundary,), llama, settings(letters))[0] for boundary in (3, 5)]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_fit_equals_direct_least_squares(arch, letters, tmp_path):
    path = make_gguf(tmp_path / "model.gguf", arch)
    tensors = {t.name: t for t in fitted(path, settings(letters)).tensors}
    with loaded(path, n_threads=1) as context:
        windows = given_text(context, (letters,), N_TOKENS // N_WINDOW, 128).windows
    taps = recorded(path, windows.tolist())
    x = np.concatenate(
        [fit.with_bias(fit.normalised(tap.states[BOUNDARY][1:], 1e-6)) for tap in taps]
    )
    y = kv(taps, 6)
    d = np.mean([weights(taps, layer) for layer in WEIGHING], axis=0)
    own = Weights(read_source(path)).own_projection(6, *[y.shape[1] // 2] * 2)
    root = np.sqrt(d.astype(np.float64))[:, None]
    weighted = x.astype(np.float64) * root
    start = np.vstack([own.gain[:, None] * own.weight.T, own.bias]).astype(np.float64)
    power = np.square(weighted).sum(0) * np.append(np.full(128, fit.RIDGE), fit.BIAS_RIDGE)
    # The ridge acts like additional rows of the least-squares problem.
    rows = np.vstack([weighted, np.diag(np.sqrt(power))])
    rest = np.vstack([(y - x @ start) * root, np.zeros((129, y.shape[1]))])
    expected = start + np.linalg.lstsq(rows, rest, rcond=None)[0]
    result = _stored(tensors, 6)
    # Compare predictions instead of weights, since qwen2's biases make the inputs nearly collinear
    # with the column of ones.
    predicted = (x[:, :-1] * own.gain) @ result[0].T + result[1]
    np.testing.assert_allclose(predicted, x @ expected, atol=2e-3)


def _stored(tensors, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight [n_kv, n_embd] and bias [n_kv] of F32 tensors."""
    weights, biases = [], []
    for part in "kv":
        weight = tensors[f"blk.{layer}.pop_attn_{part}.weight"]
        weights.append(np.frombuffer(weight.data, np.float32).reshape(weight.dims[::-1]))
        bias = tensors[f"blk.{layer}.pop_attn_{part}.bias"]
        biases.append(np.frombuffer(bias.data, np.float32))
    return np.concatenate(weights), np.concatenate(biases)


def test_groups_of_layers_give_the_same_fit(llama: Path, letters: Path, whole: Fitted):
    plan = planned(llama)
    small = plan_needs((plan,), FitOptions(memory_bytes=1))
    large = plan_needs((plan,), FitOptions(memory_bytes=1 << 30))
    pairs = [(BOUNDARY, layer) for layer in (5, 6, 7)]
    assert list(small.groups) == [(pair,) for pair in pairs]
    assert list(large.groups) == [tuple(pairs)]
    assert small.sums_bytes < large.sums_bytes
    assert fitted(llama, settings(letters, memory_bytes=1)) == whole


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_several_depths_are_fitted_in_one_pass(memory_bytes, llama, letters, apart):
    options = settings(letters, memory_bytes=memory_bytes)
    read: list[int] = []
    watch = Watch(on_progress=lambda done, total: read.append(done))
    together = fitted_at((3, 5), llama, options, watch)
    assert read[-1] == N_TOKENS * (1 if memory_bytes > 1 else 6)
    assert [len(each.tensors) for each in together] == [4 * 4, 2 * 4]
    assert list(together) == apart


@pytest.mark.parametrize(("memory_bytes", "stop_after"), [(1 << 30, 3), (1 << 30, 6), (1, 7)])
def test_stop_ends_a_fit_after_a_window_or_a_layer(memory_bytes, stop_after, llama, letters):
    with pytest.raises(StoppedError):
        fitted(llama, settings(letters, memory_bytes=memory_bytes), stopped_at(stop_after))


def test_fitted_file_names_its_text(llama: Path, whole: Fitted, tmp_path: Path):
    target = tmp_path / "pop.gguf"
    meta = convert(planned(llama), llama, target, fitted=whole)
    assert meta == read_pop_meta(target)
    assert meta.calibration is not None
    assert (meta.calibration.name, meta.calibration.n_tokens) == ("words.txt", N_TOKENS)
