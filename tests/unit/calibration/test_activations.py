"""The taps: what the calibration sees of a model while it computes."""

import signal
from pathlib import Path

import numpy as np
import pytest

from pop_converter.fit import least_squares as fit
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import read_source
from pop_local.calibration.activations import reading
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.texts import N_WINDOW
from support.calibrating import ARCHS, BOUNDARY, Recorder, prompt, recorded
from support.synthetic import make_gguf


@pytest.mark.parametrize("arch", ARCHS)
def test_the_taps_show_what_the_layer_computes(arch: str, tmp_path: Path):
    """K and V of layer l are its own projections of the state before it; attention adds up."""
    path = make_gguf(tmp_path / "model.gguf", arch)
    shown = recorded(path, [prompt(N_WINDOW)], boundaries=(5, 6), layers=(5, 6))
    weights = Weights(read_source(path))
    for layer in (5, 6):
        k, v, mass = shown.layers[layer][0]
        own = weights.own_projection(layer, k.shape[1], v.shape[1])
        x = fit.with_bias(fit.normalised(shown.states[layer][0], 1e-6)).astype(np.float64)
        wanted = (x[:, :-1] * own.gain) @ own.weight.T + own.bias
        np.testing.assert_allclose(np.concatenate([k, v], axis=1), wanted, atol=0.02)
        assert own.n_k == k.shape[1]
        assert mass.shape == (N_WINDOW,) and mass.min() >= -1e-4
        assert mass[-1] == pytest.approx(0, abs=1e-4)  # nothing comes after it
    n_head = 4
    full = recorded(path, [prompt(2)], layers=(5,)).layers[5][0][2]
    assert 0 < full[0] < n_head and full[1] == pytest.approx(0, abs=1e-5)


def test_windows_do_not_see_each_other(llama: Path):
    one, other = prompt(N_WINDOW, 1), prompt(N_WINDOW, 2)
    shown = recorded(llama, [one, other, one])
    first, second, third = shown.states[BOUNDARY]
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_what_an_observer_raises_comes_out(llama: Path):
    class Failing(Recorder):
        def layer(self, layer, k, v, mass) -> None:
            raise KeyboardInterrupt

    with LoadedModel(llama, n_threads=1) as model:
        context = reading(model, Failing(), boundaries=(4,), layers=(6,), n_window=N_WINDOW)
        with context as opened, pytest.raises(KeyboardInterrupt):
            opened.window(prompt(64))


def test_what_a_signal_raises_comes_out(llama: Path):
    class Stopping(Recorder):
        def layer(self, layer, k, v, mass) -> None:
            signal.raise_signal(signal.SIGTERM)

    def leave(number, frame) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with LoadedModel(llama, n_threads=1) as model:
            context = reading(model, Stopping(), boundaries=(4,), layers=(5,), n_window=N_WINDOW)
            with context as opened, pytest.raises(SystemExit):
                opened.window(prompt(64))
    finally:
        signal.signal(signal.SIGTERM, before)
