"""What the virtual gates say of a model on a text: importance for reading and for answering."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pop_local.measure.estimate import Estimate, mean, redrawn
from pop_local.research.decoder import Decoder
from pop_local.research.gates import gate_gradients


@dataclass(frozen=True)
class Stage:
    """The importance I_l of each layer, in squares of nats, summed over a window's answer rows.

    Of the last third of the layers and of the others there are the median layer, since single
    layers make up most of a mean, and the mean. `median_ratio` is the last third's to the others',
    None where those add nothing.
    """

    layers: tuple[Estimate, ...]
    last_third_median: Estimate
    others_median: Estimate
    median_ratio: Estimate | None
    last_third_mean: Estimate
    others_mean: Estimate


@dataclass(frozen=True)
class Importance:
    """Both stages; `n_context` and `n_answer` are the tokens of a window that each gate scales."""

    n_windows: int
    n_context: int
    n_answer: int
    prefill: Stage
    decode: Stage


def measure_importance(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n_context: int,
    *,
    n_batch: int,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> Importance:
    """Estimate the importance of layers (pop_local.research.gates) from windows of equal length.

    Their first tokens are as the model wants a text to begin. `on_progress` is as in
    `gate_gradients`.
    """
    tokens = np.array(windows, np.int32)
    found = gate_gradients(
        decoder, tokens, n_context, n_batch=n_batch, seed=seed, on_progress=on_progress
    )
    return Importance(
        n_windows=len(tokens),
        n_context=n_context,
        n_answer=tokens.shape[1] - n_context,
        prefill=_stage(found.prefill**2),
        decode=_stage(found.decode**2),
    )


def _stage(squares: NDArray[np.float64]) -> Stage:
    """Summarise squared gradients [n_windows, n_layer]."""
    n_layer = squares.shape[1]
    n_others = n_layer - max(1, n_layer // 3)
    last, others = squares[:, n_others:], squares[:, :n_others]

    def median_ratio(drawn: NDArray[np.float64]) -> float:
        return _median_layer(drawn[:, n_others:]) / _median_layer(drawn[:, :n_others])

    return Stage(
        layers=tuple(mean(squares[:, layer]) for layer in range(n_layer)),
        last_third_median=redrawn(last, _median_layer),
        others_median=redrawn(others, _median_layer),
        median_ratio=redrawn(squares, median_ratio) if _median_layer(others) else None,
        last_third_mean=mean(last),
        others_mean=mean(others),
    )


def _median_layer(squares: NDArray[np.float64]) -> float:
    return float(np.median(squares.mean(axis=0)))
