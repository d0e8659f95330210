"""Test wide fits: their sums, tensors and cost, and when they are chosen."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from pop_converter.architecture.work import LIMIT_PROMPT, fit_macs, speedup_limit, wide_weights
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import _MOST_NEURON, wide_input
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert, measure, stored_bytes
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import MAX_WIDE_COST, fit_cost, fit_kind, fit_needs
from pop_local.calibration.texts import N_WINDOW, given_text
from pop_local.engine.llama.graph_macs import GraphMacs
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
    weights,
)
from support.converted import made_up
from support.shapes import read_pop_meta, read_shape
from support.synthetic import make_gguf

OWN, FITTED, WIDE = Projection

N_PREV, N_NEURONS = 32, 64


def matrices(fit_result) -> dict[str, np.ndarray]:
    """Return F32 tensors by name, in float64."""
    return {
        tensor.name: np.frombuffer(tensor.data, np.float32).reshape(tensor.dims[::-1]).astype(float)
        for tensor in fit_result.tensors
    }


def inputs(path: Path, tensors, taps) -> np.ndarray:
    """Return [x, z, 1] of all rows except each window's first, in float64 and row by row."""
    gain = Weights(read_source(path))[f"blk.{BOUNDARY}.ffn_norm.weight"].astype(float)
    name, rows = f"blk.{BOUNDARY}.pop_", []
    for tap in taps:
        window = tap.states[BOUNDARY]
        x = window / np.sqrt(np.mean(window.astype(float) ** 2, 1, keepdims=True) + 1e-6)
        for i in range(1, len(x)):
            parts = [x[i], tensors[f"{name}prev.weight"] @ x[i - 1]]
            if f"{name}ffn_up.weight" in tensors:
                gate = tensors[f"{name}ffn_gate.weight"] @ (gain * x[i])
                up = tensors[f"{name}ffn_up.weight"] @ (gain * x[i])
                if "gemma" in path.stem:
                    cubic = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
                    value = gate * (1 + np.tanh(cubic)) / 2 * up
                else:
                    value = gate / (1 + np.exp(-gate)) * up
                parts.append(np.clip(value, -5, 5))
            rows.append(np.concatenate([*parts, [1]]))
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3", "qwen3moe"])
def test_wide_fit_equals_direct_least_squares(arch, letters, tmp_path):
    path = make_gguf(tmp_path / f"{arch}.gguf", arch)
    options = settings(letters)
    tensors = matrices(fitted(path, options, projection=WIDE))
    with loaded(path, n_threads=1) as context:
        windows = given_text(context, (letters,), N_TOKENS // N_WINDOW, 128).windows
    taps = recorded(path, windows.tolist())
    x = inputs(path, tensors, taps)
    n_neurons = 0 if arch == "qwen3moe" else N_NEURONS
    assert x.shape[1] == 128 + N_PREV + n_neurons + 1
    y = kv(taps, 6)
    own = Weights(read_source(path)).own_projection(6, *[y.shape[1] // 2] * 2)
    zeros = np.zeros((x.shape[1] - 129, y.shape[1]))
    start = np.vstack([own.gain[:, None] * own.weight.T, zeros, own.bias])
    ridge = np.append(np.full(x.shape[1] - 1, fit.RIDGE), fit.BIAS_RIDGE)
    root = np.sqrt(np.mean([weights(taps, layer) for layer in WEIGHING], axis=0))[:, None]
    rows = np.vstack([root * x, np.diag(np.sqrt(np.square(root * x).sum(0) * ridge))])
    rest = np.vstack([root * (y - x @ start), np.zeros((x.shape[1], y.shape[1]))])
    expected = x @ (start + np.linalg.lstsq(rows, rest, rcond=None)[0])

    def stored(part: str) -> np.ndarray:
        return np.concatenate([tensors[f"blk.6.pop_attn_{kv}{part}"] for kv in "kv"])

    result = (x[:, :128] * own.gain) @ stored(".weight").T + stored(".bias")
    wide = x[:, 128:-1] @ stored("_wide.weight").T
    np.testing.assert_allclose(result + wide, expected, atol=2e-3)
    assert np.abs(wide).mean() > 0.01


@pytest.mark.slow
def test_plain_fits_use_the_same_sums(llama, letters):
    kinds = (FITTED, WIDE)
    together = fitted_at((3, 5), llama, settings(letters), projections=kinds)
    alone = [fitted_at((3, 5), llama, settings(letters), projections=(kind,)) for kind in kinds]
    assert [each.projection for each in together] == [*kinds, *kinds]
    for one, other in zip([*together[::2], *together[1::2]], chain(*alone), strict=True):
        ours, theirs = matrices(one), matrices(other)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_allclose(values, theirs[name], atol=1e-4)


def test_strongest_neurons_are_chosen_and_scaled(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    shape, weights = read_shape(path), Weights(read_source(path))
    rng = np.random.default_rng(0)
    windows = [rng.standard_normal((200, 128), np.float32) for _ in range(2)]
    wide = wide_input(shape, weights, BOUNDARY, windows)
    assert wide.neurons is not None
    z = wide(windows[0])
    assert z.shape == (200, N_PREV + N_NEURONS)
    assert np.abs(z[:, N_PREV:]).max() <= _MOST_NEURON
    together = np.concatenate([wide.neurons(window) for window in windows])
    np.testing.assert_allclose(together.std(axis=0), 1, atol=1e-3)
    # p is the projected previous row. The first row is its own predecessor.
    np.testing.assert_allclose(z[1:, :N_PREV], windows[0][:-1] @ wide.previous.T, atol=1e-5)
    np.testing.assert_allclose(z[0, :N_PREV], windows[0][0] @ wide.previous.T, atol=1e-5)
    name = f"blk.{BOUNDARY}.ffn_"
    gate, up, down = (weights[f"{name}{part}.weight"] for part in ("gate", "up", "down"))
    selection = np.any([(gate == row).all(1) for row in wide.neurons.gate], axis=0)
    inner = np.concatenate(windows) * weights[f"{name}norm.weight"]
    value = inner @ gate.T / (1 + np.exp(-inner @ gate.T)) * (inner @ up.T)
    power = value.std(0) * np.linalg.norm(down, axis=0)
    assert (
        selection.sum() == N_NEURONS and power[selection].min() >= power[~selection].max() * 0.9999
    )


def test_operation_count_of_wide_fit_equals_its_weights(llama):
    shape, plan = read_shape(llama), planned(llama, projection=WIDE)
    result = made_up(plan)
    n_wide = sum(
        tensor.dims[0] * tensor.dims[1]
        for tensor in result.tensors
        if "attn" not in tensor.name or "_wide" in tensor.name
    )
    assert wide_weights(shape, BOUNDARY, WIDE) == n_wide
    assert fit_macs(shape, BOUNDARY, FITTED, 300) == fit_macs(shape, BOUNDARY, OWN, 300) == 0
    assert fit_macs(shape, BOUNDARY, WIDE, 300) == 300 * n_wide
    assert plan.speedup_limit < planned(llama).speedup_limit
    sidecar = llama.with_name("wide.gguf")
    write_sidecar(plan, llama, sidecar, fitted=result, force=True)
    of_file = speedup_limit(GraphMacs(llama, sidecar), LIMIT_PROMPT, BOUNDARY, 32)
    assert of_file == pytest.approx(plan.speedup_limit, rel=1e-3)
    assert stored_bytes(plan, KvType.Q8_0) == sum(len(tensor.data) for tensor in result.tensors)


@pytest.mark.parametrize("kind", [FITTED, WIDE])
def test_fit_of_fused_projections_saves_q(kind, tmp_path):
    path = make_gguf(tmp_path / "phi3.gguf", "phi3")
    plan = planned(path, projection=kind)
    sidecar = path.with_name("sidecar.gguf")
    write_sidecar(plan, path, sidecar, fitted=made_up(plan), force=True)
    of_file = speedup_limit(GraphMacs(path, sidecar), LIMIT_PROMPT, BOUNDARY, 32)
    assert of_file == pytest.approx(plan.speedup_limit, rel=1e-3)


def test_wide_file_has_the_planned_keys_and_size(llama, tmp_path):
    target = tmp_path / "pop.gguf"
    plan = planned(llama, projection=WIDE)
    meta = convert(plan, llama, target, fitted=made_up(plan))
    assert meta == read_pop_meta(target) and meta.projection == WIDE and meta.is_fitted
    assert abs(measure(plan, llama).output_bytes - target.stat().st_size) < 2048


# --- choice of the kind of fit


def test_expensive_wide_fit_is_made_on_request_only(llama):
    plan = planned(llama)
    assert fit_cost(plan, WIDE) > MAX_WIDE_COST
    assert fit_kind(plan, FitOptions()) == FITTED
    assert fit_kind(plan, FitOptions(projection=WIDE)) == WIDE


def test_cheap_wide_fit_is_the_default(tmp_path):
    """Use a model with few K/V heads and a wide FFN."""
    path = make_gguf(tmp_path / "model.gguf", "llama", n_head_kv=1, n_ff=2048)
    plan = make_plan(read_shape(path), boundary=6, projection=FITTED, macs=GraphMacs(path))
    assert fit_kind(plan, FitOptions()) == WIDE
    assert fit_kind(plan, FitOptions(projection=FITTED)) == FITTED
    plain = fit_needs([plan], FitOptions(projection=FITTED))
    assert fit_needs([plan], FitOptions()).sums_bytes > plain.sums_bytes
