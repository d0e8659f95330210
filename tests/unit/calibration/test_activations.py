"""Test the taps, which copy activations out of a model's graph."""

import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from pop_converter.fit import least_squares as fit
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import read_source
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.calibration.texts import N_WINDOW
from pop_local.engine.llama.taps import TapRequest
from support.calibrating import ARCHS, BOUNDARY, attention, kv, prompt, recorded
from support.synthetic import make_gguf

STRIDE = 16  # LLAMA_POP_TAP_STRIDE


@pytest.mark.parametrize("arch", ARCHS)
def test_taps_contain_the_layers_inputs_and_outputs(arch: str, tmp_path: Path):
    """Expect layer l's K and V to be its projections of the preceding state."""
    path = make_gguf(tmp_path / "model.gguf", arch)
    tokens = prompt(N_WINDOW)
    [taps] = recorded(path, [tokens], boundaries=(5, 6), layers=(5, 6))
    weights = Weights(read_source(path))
    for layer, heads in zip((5, 6), attention(path, tokens, (5, 6)), strict=True):
        stored = kv([taps], layer)
        own = weights.own_projection(layer, taps.k[layer].shape[1], taps.v[layer].shape[1])
        x = fit.with_bias(fit.normalised(taps.states[layer], 1e-6)).astype(np.float64)[1:]
        expected = (x[:, :-1] * own.gain) @ own.weight.T + own.bias
        np.testing.assert_allclose(stored, expected, atol=0.02)
        earlier = np.tril(heads.sum(0), -1)[::STRIDE].sum(0)
        np.testing.assert_allclose(
            taps.mass[layer], earlier, rtol=0.02, atol=0.05
        )  # the router may choose another expert


def test_windows_do_not_see_each_other(llama: Path):
    one, other = prompt(N_WINDOW, 1), prompt(N_WINDOW, 2)
    taps = recorded(llama, [one, other, one])
    first, second, third = (tap.states[BOUNDARY] for tap in taps)
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_exception_of_a_signal_handler_is_raised(llama: Path):
    def leave(number, frame) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with loaded(llama, n_threads=1) as context:
            reading = WindowReader(context, TapRequest((4,), (5,)))
            threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()
            with pytest.raises(SystemExit):
                while True:
                    reading.window(prompt(N_WINDOW))
    finally:
        signal.signal(signal.SIGTERM, before)
