"""One window, scored: by the full model, then by each pruning against it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pop_local.engine.llama.backend import Mode
from pop_local.measure.divergence import (
    Divergence,
    Likelihood,
    Predictions,
    divergence,
    likelihood,
    predictions,
)
from pop_local.measure.forced import Forced, Pruning
from pop_local.measure.probes import copied


@dataclass(frozen=True)
class Window:
    """What is read, what follows it, and a passage of it to be repeated, as tokens."""

    context: Sequence[int]
    continuation: Sequence[int]
    passage: Sequence[int]

    @property
    def n_tokens(self) -> int:
        return len(self.context) + len(self.continuation) + len(self.passage)


@dataclass(frozen=True)
class FullScores:
    """The full model on one window; `predicted` is for its continuation."""

    predicted: Predictions
    continuation: Likelihood
    passage: Likelihood


@dataclass(frozen=True)
class Scores:
    """One window under one pruning, against the full model."""

    divergence: Divergence
    full: Likelihood
    pruned: Likelihood
    copy_full: Likelihood
    copy_pruned: Likelihood


def score_full(reader: Forced, window: Window) -> FullScores:
    """Score a window by the full model."""
    reader.read(window.context, Mode.OFF)
    predicted = predictions(reader.predict(window.continuation))
    return FullScores(
        predicted=predicted,
        continuation=likelihood(predicted, np.asarray(window.continuation)),
        passage=copied(reader, window.passage),
    )


def score_pruned(reader: Forced, window: Window, full: FullScores, pruning: Pruning) -> Scores:
    """Score a window under a pruning, against what the full model made of it."""
    reader.set_boundary(pruning.boundary)
    reader.read(window.context, pruning.context)
    predicted = predictions(reader.predict(window.continuation, pruning.continuation))
    return Scores(
        divergence=divergence(full.predicted, predicted),
        full=full.continuation,
        pruned=likelihood(predicted, np.asarray(window.continuation)),
        copy_full=full.passage,
        copy_pruned=copied(reader, window.passage, pruning.continuation),
    )
