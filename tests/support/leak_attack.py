"""Attack learned sums and sidecars: tell rows that were read from rows that were not.

The attacker has the file, the model and a guess of the text, so it can compute the row's input x
and output y. A row in the sums has a smaller leverage x' (X'X)^-1 x, and a smaller residual
y - x W of the fit W, than another row. A sidecar contains only W, quantized and with a larger
ridge. An attacker with similar texts divides these values by those of the sums over these texts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import Gram, KvType, with_bias
from pop_converter.fit.wide import WideInput
from pop_converter.projection import Projection
from pop_local.calibration.activations import WindowReader
from pop_local.engine.learning.sums import Summing
from pop_local.engine.llama.taps import Tapped

_RIDGE = 1e-6


@dataclass(frozen=True)
class Rows:
    """Inputs [n, n_inputs + 1] and outputs [n, sum of n_k + n_v] of a window, without row 0."""

    x: np.ndarray
    y: np.ndarray


def joined(windows: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(each, name) for each in windows]) for name in ("x", "y")))


class Attacker:
    """An attacker that knows the model, and has the wider input from the stolen file."""

    def __init__(
        self, summing: Summing, reader: WindowReader, boundary: int, wide: WideInput
    ) -> None:
        self._summing, self._reader, self._boundary = summing, reader, boundary
        self._wide = wide
        self._layers = list(summing.layers(boundary))

    def rows(self, tokens: Sequence[int]) -> Rows:
        return self.rows_of(self._reader.window(tokens))

    def rows_of(self, tapped: Tapped) -> Rows:
        x = self._summing.state(self._boundary, tapped)
        y = np.hstack([part[layer] for layer in self._layers for part in (tapped.k, tapped.v)])
        return Rows(with_bias(x, self._wide(x))[1:].astype(float), y[1:].astype(float))

    def separations(
        self, stolen: Gram, read: Sequence[Rows], unread: Sequence[Rows], own: Gram
    ) -> dict[str, float]:
        """Return each attack's AUC: 0.5 for a guess, 1 if all read rows come first.

        `own`: the sums over the attacker's similar texts (see `own_sums`).
        """
        scores = [self._scores(stolen, joined(each), own) for each in (read, unread)]
        return {name: auc(scores[0][name], scores[1][name]) for name in scores[0]}

    def readouts(
        self, stolen: Gram, windows: Sequence[Sequence[int]], own: Gram, n_vocab: int
    ) -> dict[str, int]:
        """Return for how many windows each attack ranks the true token of a place first.

        Each window has one place, and 40 random candidates that include the true token. The
        attacker knows the tokens before the place.
        """
        rng = np.random.default_rng(0)
        found: Counter[str] = Counter()
        for window in windows:
            place = int(rng.integers(16, 96))
            others = rng.choice(np.setdiff1d(np.arange(3, n_vocab), window[place]), 39, False)
            rows = [
                self.rows([*window[:place], token]) for token in (window[place], *others.tolist())
            ]
            last = Rows(*(np.stack([getattr(each, name)[-1] for each in rows]) for name in "xy"))
            for name, scores in self._scores(stolen, last, own).items():
                found[name] += int(scores.argmax() == 0)
        return dict(found)

    def _scores(self, stolen: Gram, rows: Rows, own: Gram) -> dict[str, np.ndarray]:
        leverage, residual = _surprise(stolen, rows)
        own_leverage, own_residual = _surprise(own, rows)
        left = np.log(((rows.y - self._projected(stolen, rows.x)) ** 2).sum(1))
        return {
            "leverage": -leverage,
            "residual": -residual,
            "sidecar": -left,
            "leverage, similar texts": own_leverage - leverage,
            "residual, similar texts": own_residual - residual,
            "sidecar, similar texts": own_residual - left,
        }

    def _projected(self, gram: Gram, x: np.ndarray) -> np.ndarray:
        """Return the outputs that a sidecar from the sums projects for inputs [n, n_inputs + 1]."""
        shape, outputs = self._summing.shape, []
        n_embd, kind = shape.n_embd, Projection.WIDE
        for layer in self._layers:
            solved = self._summing.solve(gram, self._boundary, layer, kind, fit.RIDGE, KvType.Q8_0)
            own = self._summing._weights.own_projection(layer, shape.n_k[layer], shape.n_v[layer])
            found = fit.decode(layer, {tensor.name: tensor for tensor in solved}, own)
            assert found.wide is not None
            projected = (x[:, :n_embd] * found.gain) @ found.weight.T + found.bias
            outputs.append(projected + x[:, n_embd:-1] @ found.wide.T)
        return np.hstack(outputs)


def own_sums(windows: Iterable[Rows]) -> Gram:
    """Return the sums over the attacker's own texts, with equal weights."""
    every = list(windows)
    n_inputs, n_outputs = every[0].x.shape[1], every[0].y.shape[1]
    total = Gram.empty(n_inputs - 1, {0: n_outputs})
    for rows in every:
        total.add(rows.x, {0: rows.y}, np.ones(len(rows.x), np.float32))
    return total


def _surprise(gram: Gram, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithms of each row's leverage and residual."""
    xx = gram.xx.astype(float)
    inverse = np.linalg.inv(xx + _RIDGE * np.diag(np.diag(xx)))
    fitted = inverse @ np.hstack(list(gram.xy.values())).astype(float)
    leverage = ((rows.x @ inverse) * rows.x).sum(1)
    residual = ((rows.y - rows.x @ fitted) ** 2).sum(1)
    return np.log(leverage), np.log(residual)


def auc(read: np.ndarray, unread: np.ndarray) -> float:
    """Return the chance that a read row has a higher score than an unread one."""
    ranks = np.concatenate([read, unread]).argsort().argsort()[: len(read)] + 1
    n = len(read)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(unread)))
