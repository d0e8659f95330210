"""Attack learned sums: tell rows that were read from rows that were not.

The attacker has the sums, the model and a guess of the text, so it can compute the row's input x
and output y. A row in the sums has a smaller leverage x' (X'X)^-1 x, and a smaller residual
y - x W of the fit W, than another row. An attacker with similar texts divides both by the values
for the sums over these texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pop_converter.fit.least_squares import Gram, with_bias
from pop_local.calibration.activations import WindowReader
from pop_local.engine.learning.sums import Summing, Sums
from pop_local.engine.llama.taps import Tapped

_RIDGE = 1e-6


@dataclass(frozen=True)
class Rows:
    """Inputs [n, n_inputs + 1] and outputs [n, sum of n_k + n_v] of a window, without row 0."""

    x: np.ndarray
    y: np.ndarray


class Attacker:
    """An attacker that knows the model, and has the wider input from the stolen file."""

    def __init__(self, summing: Summing, reader: WindowReader, stolen: Sums, boundary: int) -> None:
        self._summing, self._reader, self._boundary = summing, reader, boundary
        self._wide = stolen.wides[boundary]
        self._layers = list(stolen.grams[boundary].xy)
        self._gram = stolen.grams[boundary]

    def rows(self, tokens: Sequence[int]) -> Rows:
        return self._rows_of(self._reader.window(tokens))

    def _rows_of(self, tapped: Tapped) -> Rows:
        x = self._summing.state(self._boundary, tapped)
        y = np.hstack([part[layer] for layer in self._layers for part in (tapped.k, tapped.v)])
        return Rows(with_bias(x, self._wide(x))[1:].astype(float), y[1:].astype(float))

    def own_sums(self, windows: Iterable[Rows]) -> Gram:
        """Return the sums over the attacker's own texts, with equal weights."""
        every = list(windows)
        x, y = (np.concatenate([getattr(each, name) for each in every]) for name in ("x", "y"))
        return Gram(x.T @ x, {0: x.T @ y}, len(x))

    def separations(
        self, read: Sequence[Rows], unread: Sequence[Rows], own: Gram
    ) -> dict[str, float]:
        """Return each attack's AUC: 0.5 for a guess, 1 if all read rows come first."""
        scores = [self._scores(each, own) for each in (read, unread)]
        return {name: auc(scores[0][name], scores[1][name]) for name in scores[0]}

    def _scores(self, windows: Sequence[Rows], own: Gram) -> dict[str, np.ndarray]:
        x = np.concatenate([each.x for each in windows])
        y = np.concatenate([each.y for each in windows])
        leverage, residual = _surprise(self._gram, x, y)
        own_leverage, own_residual = _surprise(own, x, y)
        return {
            "leverage": -leverage,
            "residual": -residual,
            "leverage, similar texts": own_leverage - leverage,
            "residual, similar texts": own_residual - residual,
        }


def _surprise(gram: Gram, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithms of each row's leverage and residual."""
    xx = gram.xx.astype(float)
    inverse = np.linalg.inv(xx + _RIDGE * np.diag(np.diag(xx)))
    fitted = inverse @ np.hstack(list(gram.xy.values())).astype(float)
    leverage, residual = ((x @ inverse) * x).sum(1), ((y - x @ fitted) ** 2).sum(1)
    return np.log(leverage), np.log(residual)


def auc(read: np.ndarray, unread: np.ndarray) -> float:
    """Return the chance that a read row has a higher score than an unread one."""
    ranks = np.concatenate([read, unread]).argsort().argsort()[: len(read)] + 1
    n = len(read)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(unread)))
