"""Compare two models' predictions for the same tokens: KL, log-likelihood, and top token.

All sums are computed in float64. Single-precision log-softmax over a large vocabulary has an error
of about 1e-6, which is as large as the smallest differences that matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Logits = NDArray[np.floating[Any]]

# Number of values in a float64 block. A block of this size (1 MB) fits in a core's L2 cache.
_CHUNK_VALUES = 1 << 17


@dataclass(frozen=True)
class Predictions:
    """Logits [n, n_vocab], and each row's log-sum-exp [n] and most likely token [n]."""

    logits: Logits
    log_z: Floats
    top1: NDArray[np.int64]


@dataclass(frozen=True)
class Likelihood:
    """The target tokens' NLL [n] in nats, and whether each target is the most likely token [n]."""

    nll: Floats
    is_top1: Flags


@dataclass(frozen=True)
class Divergence:
    """The rows' KL(full || pruned) [n] in nats. `same_top1` [n]: True if the top tokens agree."""

    kl: Floats
    same_top1: Flags


def predictions(logits: Logits) -> Predictions:
    """Return the predictions for logits [n, n_vocab], without copying the logits."""
    log_z = np.empty(len(logits))
    for rows in _chunks(logits):
        largest = logits[rows].max(axis=1).astype(np.float64)
        shifted = logits[rows] - largest[:, None]
        log_z[rows] = largest + np.log(np.exp(shifted, out=shifted).sum(axis=1))
    return Predictions(logits, log_z, logits.argmax(axis=1))


def to_half(predicted: Predictions) -> Predictions:
    """Return the predictions as log-probabilities in half precision, which halves memory use.

    Half precision adds an error of about 1e-6 to the KL. The field `top1` stays unchanged.
    """
    logits = np.empty(predicted.logits.shape, np.float16)
    for rows in _chunks(predicted.logits):
        logits[rows] = predicted.logits[rows] - predicted.log_z[rows, None]
    return replace(predictions(logits), top1=predicted.top1)


def likelihood(predicted: Predictions, targets: NDArray[np.int64]) -> Likelihood:
    """Return each target token's NLL [n], and whether the token is the most likely one [n]."""
    of_targets = np.take_along_axis(predicted.logits, targets[:, None], axis=1)[:, 0]
    return Likelihood(predicted.log_z - of_targets, predicted.top1 == targets)


def divergence(full: Predictions, pruned: Predictions) -> Divergence:
    """Compare two models' predictions for the same tokens."""
    kl = pruned.log_z - full.log_z
    for rows in _chunks(full.logits):
        p = full.logits[rows] - full.log_z[rows, None]
        np.exp(p, out=p)
        differences = np.subtract(full.logits[rows], pruned.logits[rows], dtype=np.float64)
        kl[rows] += np.einsum("ij,ij->i", p, differences)
    return Divergence(kl, full.top1 == pruned.top1)


def _chunks(logits: Logits) -> Iterator[slice]:
    n_rows, n_vocab = logits.shape
    step = max(1, _CHUNK_VALUES // n_vocab)
    return (slice(start, start + step) for start in range(0, n_rows, step))
