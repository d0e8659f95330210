"""What two models make of the same tokens: KL divergence, log-likelihood, first choice.

float64 throughout: single precision has an error of 1e-6 in log-softmax over a large vocabulary,
which is as large as what must be told from zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Values of one float64 array: 16 rows of the largest vocabularies, 32 MB.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Likelihood:
    """Per token: negative log-likelihood in nats, and whether it was the model's first choice."""

    nll: Floats
    is_top1: Flags


@dataclass(frozen=True)
class Divergence:
    """Per position: KL(full || pruned) in nats, and whether both have the same first choice."""

    kl: Floats
    same_top1: Flags


def likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> Likelihood:
    """Of the targets (n) under logits (n, n_vocab)."""
    nll = np.empty(len(targets))
    for rows in _chunks(logits):
        log_p = log_softmax(logits[rows])
        nll[rows] = -np.take_along_axis(log_p, targets[rows, None], axis=1)[:, 0]
    return Likelihood(nll, logits.argmax(axis=1) == targets)


def divergence(full: NDArray[np.float32], pruned: NDArray[np.float32]) -> Divergence:
    """Of two sets of logits (n, n_vocab) over the same tokens."""
    kl = np.empty(len(full))
    for rows in _chunks(full):
        log_p, log_q = log_softmax(full[rows]), log_softmax(pruned[rows])
        kl[rows] = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
    return Divergence(kl, full.argmax(axis=1) == pruned.argmax(axis=1))


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Log-probabilities in nats of logits (n, n_vocab)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _chunks(logits: NDArray[np.float32]) -> Iterator[slice]:
    n_rows, n_vocab = logits.shape
    step = max(1, _CHUNK_VALUES // n_vocab)
    return (slice(start, start + step) for start in range(0, n_rows, step))
