"""Metrics computed over windows, with their standard errors.

Each window is one sample, because the tokens within a window are correlated. Standard errors of
means are derived from the spread across windows. Standard errors of quantiles are bootstrapped.
"""

import math
from dataclasses import dataclass

import numpy as np

from pop_local.measure.divergence import Flags, Floats

_N_BOOTSTRAP = 200
_SEED = 20260203
# The exponential of a larger number overflows a float64.
_MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class Estimate:
    """A metric and its standard error, which is None if the metric comes from a single window."""

    value: float
    se: float | None


def mean(per_window: Floats | Flags) -> Estimate:
    """Return the mean of numbers or flags [n_windows, ...] and its standard error."""
    windows = per_window.reshape(len(per_window), -1).mean(axis=1, dtype=np.float64)
    n = len(windows)
    se = float(windows.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Estimate(float(windows.mean()), se)


def exp_mean(per_window: Floats) -> Estimate:
    """Return exp(mean), such as a perplexity, and a first-order estimate of its error."""
    inner = mean(per_window)
    value = math.exp(inner.value) if inner.value < _MAX_EXPONENT else math.inf
    return Estimate(value, None if inner.se is None else value * inner.se)


def ratio(upper: Floats, lower: Floats) -> Estimate:
    """Return the ratio of two means over windows, with a first-order error estimate."""
    value = float(upper.mean() / lower.mean())
    return Estimate(value, mean((upper - value * lower) / lower.mean()).se)


def quantile(per_window: Floats, share: float) -> Estimate:
    """Return a quantile of all values [n_windows, n_tokens], and bootstrap its standard error."""
    value, n = float(np.quantile(per_window, share)), len(per_window)
    if n < 2:
        return Estimate(value, None)
    draws = np.random.default_rng(_SEED).integers(0, n, (_N_BOOTSTRAP, n))
    quantiles = [float(np.quantile(per_window[windows], share)) for windows in draws]
    return Estimate(value, float(np.std(quantiles, ddof=1)))
