"""Virtual gates: gradients against finite differences, importance against the KL it stands for."""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_converter.gguf.source import read_source
from support.calls import ignore, prompt
from support.paths import TESTS
from support.synthetic import make_gguf

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
from pop_local.research.decoder import Decoder  # noqa: E402

sys.path.append(str(TESTS / "bench"))
from measure_gates import gate_gradients, stage_of  # noqa: E402

N_CONTEXT = 10
SEED = 7


class DoubleDecoder(Decoder):
    """In double precision, so that differences mean something."""

    def _to_tensor(self, values):
        return super()._to_tensor(values).double()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def decoder(request, tmp_path_factory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("gates")
    return DoubleDecoder(read_source(make_gguf(folder / "m.gguf", request.param, n_layer=3)))


def gated(decoder: Decoder, tokens: np.ndarray, gates: np.ndarray) -> Any:
    """Log-probabilities of the answer rows [n_windows, n_answer, n_vocab] under `gates`
    [n_layer, 2], without any of the code under test."""
    states = decoder.embed(tokens)
    for index in range(decoder.n_layer):
        rows = torch.full((1, tokens.shape[1], 1), gates[index, 0], dtype=torch.float64)
        rows[:, N_CONTEXT:] = gates[index, 1]
        with torch.no_grad():
            states = states + rows * (decoder.layer(index)(states) - states)
    return decoder.logits(states[:, N_CONTEXT:]).log_softmax(-1)


def test_gradients_are_those_of_finite_differences(decoder):
    windows = np.array([prompt(16, seed=1), prompt(16, seed=2)], np.int32)
    found = gate_gradients(decoder, windows, N_CONTEXT, n_batch=2, seed=SEED, on_progress=ignore)
    ones = np.ones((decoder.n_layer, 2))
    generator = torch.Generator().manual_seed(SEED)
    likelihoods = gated(decoder, windows, ones)
    targets = [torch.multinomial(row.exp(), 1, generator=generator) for row in likelihoods]

    def losses(gates: np.ndarray) -> np.ndarray:
        log_p = gated(decoder, windows, gates)
        rows = zip(log_p, targets, strict=True)
        return np.array([-row.gather(1, chosen).sum().item() for row, chosen in rows])

    for layer, stage in product(range(decoder.n_layer), range(2)):
        step = np.zeros_like(ones)
        step[layer, stage] = 1e-5
        expected = (losses(ones + step) - losses(ones - step)) / 2e-5
        computed = found[stage][:, layer]
        np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-6)
    assert abs(found[0][:, :-1]).min() > 1e-3


def test_nothing_reads_what_context_rows_take_from_the_last_layer(decoder):
    windows = np.array([prompt(16)], np.int32)
    found = gate_gradients(decoder, windows, N_CONTEXT, n_batch=1, seed=0, on_progress=ignore)
    assert found[0][0, -1] == 0
    assert found[1][0, -1] != 0


def test_importance_is_the_curvature_of_the_kl(decoder):
    """KL(open || a little closed) = I / 2 * closed ** 2, and the mean gradient is zero."""
    tokens, n_draws, closed = prompt(14, seed=3), 400, 0.02
    windows = np.array([tokens] * n_draws, np.int32)
    found = gate_gradients(decoder, windows, N_CONTEXT, n_batch=100, seed=0, on_progress=ignore)
    ones = np.ones((decoder.n_layer, 2))
    full = gated(decoder, windows[:1], ones)
    for layer, stage in product(range(decoder.n_layer - 1), range(2)):
        gates = ones.copy()
        gates[layer, stage] -= closed
        kl = (full.exp() * (full - gated(decoder, windows[:1], gates))).sum().item()
        gradients = found[stage][:, layer]
        assert (gradients**2).mean() == pytest.approx(2 * kl / closed**2, rel=0.35)
        assert abs(gradients.mean()) < 4 * gradients.std() / n_draws**0.5


def test_the_seed_decides_and_the_batch_does_not(decoder):
    windows = np.array([prompt(16, seed=seed) for seed in range(3)], np.int32)

    def run(n_batch: int, seed: int) -> np.ndarray:
        return gate_gradients(
            decoder, windows, N_CONTEXT, n_batch=n_batch, seed=seed, on_progress=ignore
        )[1]

    np.testing.assert_allclose(run(3, 0), run(2, 0), rtol=1e-9)
    assert not np.allclose(run(3, 0), run(3, 1))


def test_medians_are_of_the_layers_means_and_errors_of_windows_drawn_again():
    scale = np.array([1.0, 2.0, 3.0, 6.0])[:, None]
    squares = np.array([1.0, 90.0, 2.0, 3.0, 5.0, 6.0, 4.0, 70.0, 1.0]) * scale
    stage = stage_of(squares)
    assert (stage.last_third_median.value, stage.others_median.value) == (12, 12)
    assert (stage.last_third_mean.value, stage.others_mean.value) == (75, 53.5)
    assert stage.others_median.se == pytest.approx(4 * scale.std() / 2, rel=0.2)
    # All layers of a window are larger by the same factor.
    assert stage.median_ratio is not None
    assert stage.median_ratio.value == 1
    assert stage.median_ratio.se == pytest.approx(0, abs=1e-12)
    # Means of the layers first: the median layer of each window is another one here.
    crossed = np.array([[1.0, 5.0, 9.0, 0.0], [9.0, 1.0, 2.0, 0.0]])
    assert stage_of(crossed).others_median.value == 5


def test_layers_that_add_nothing_have_no_ratio():
    assert stage_of(np.zeros((3, 6))).median_ratio is None


def test_progress_ends_at_its_total(decoder):
    seen: list[tuple[int, int]] = []
    windows = np.array([prompt(12, seed=seed) for seed in range(3)], np.int32)
    gate_gradients(
        decoder, windows, N_CONTEXT, n_batch=2, seed=0, on_progress=lambda *now: seen.append(now)
    )
    assert seen[0] == (0, 18)
    assert seen[-1] == (18, 18)
