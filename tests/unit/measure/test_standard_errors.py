"""Quality figures from logits, and their standard errors."""

import numpy as np
import pytest

from pop_local.measure.divergence import divergence, likelihood, predictions
from pop_local.measure.estimate import exp_mean, mean, quantile, ratio


def test_divergence_equals_its_definition_with_small_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    full, pruned = rng.normal(0, 3, (2, 7, 50)).astype(np.float32)
    expected = []
    for a, b in zip(full.astype(float), pruned.astype(float), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        expected.append(sum(p * np.log(p / q)))
    monkeypatch.setattr("pop_local.measure.divergence._CHUNK_VALUES", 120)
    measured = divergence(predictions(full), predictions(pruned))
    np.testing.assert_allclose(measured.kl, expected, rtol=1e-12)
    assert (measured.same_top1 == (full.argmax(1) == pruned.argmax(1))).all()
    np.testing.assert_array_equal(divergence(predictions(full), predictions(full)).kl, 0)


def test_likelihood_is_that_of_the_targets():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    measured = likelihood(predictions(logits), np.array([1, 2]))
    np.testing.assert_allclose(measured.nll, -np.log([0.25, 0.7]), rtol=1e-6)
    assert measured.is_top1.tolist() == [False, True]


def test_large_logits_do_not_overflow():
    assert predictions(np.array([[1e4, -1e4, 0]], np.float32)).log_z == pytest.approx([1e4])


def test_standard_errors_treat_windows_as_units():
    values = np.array([[1.0, 1.0], [3.0, 3.0]])
    assert mean(values).value == 2
    assert mean(values).se == pytest.approx(1.0)
    assert mean(values[:1]).se is None
    assert exp_mean(values).value == pytest.approx(np.exp(2))
    assert exp_mean(values).se == pytest.approx(np.exp(2))


def test_bootstrap_agrees_with_the_known_error_of_a_median():
    values = np.random.default_rng(1).normal(size=(400, 1))
    # A normal distribution's median has the error sqrt(pi / 2n).
    assert quantile(values, 0.5).se == pytest.approx(np.sqrt(np.pi / 800), rel=0.3)


def test_ratio_of_proportional_figures_has_no_error():
    lower = np.array([1.0, 2.0, 4.0])
    assert ratio(0.5 * lower, lower).value == pytest.approx(0.5)
    assert ratio(0.5 * lower, lower).se == pytest.approx(0)
