"""What the virtual gates say of a model on a text: importance for reading and for answering."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pop_converter.decoder import Decoder
from pop_converter.gates import gate_gradients

from .estimate import Estimate, mean, ratio, redrawn


@dataclass(frozen=True)
class Stage:
    """I_l of each layer, in squares of nats, summed over a window's answer rows.

    Of the last third of the layers and of the others the median layer, since single layers make up
    most of a mean, and the mean; `*_ratio`: of the last third to the others.
    """

    layers: tuple[Estimate, ...]
    last_third: Estimate
    others: Estimate
    ratio: Estimate
    last_third_mean: Estimate
    others_mean: Estimate
    mean_ratio: Estimate


@dataclass(frozen=True)
class Importance:
    """`n_context` and `n_answer`: tokens of each window that prefill and decode gates apply to."""

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
    """Of windows of equal length, their first tokens as the model wants a text to begin."""
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
    """Of squared gradients [n_windows, n_layer]."""
    n_layer = squares.shape[1]
    n_last = max(1, n_layer // 3)
    last, others = squares[:, n_layer - n_last :], squares[:, : n_layer - n_last]
    return Stage(
        layers=tuple(mean(squares[:, layer]) for layer in range(n_layer)),
        last_third=redrawn(last, _median_layer),
        others=redrawn(others, _median_layer),
        ratio=redrawn(
            squares, lambda s: _median_layer(s[:, -n_last:]) / _median_layer(s[:, :-n_last])
        ),
        last_third_mean=mean(last),
        others_mean=mean(others),
        mean_ratio=ratio(last.mean(axis=1), others.mean(axis=1)),
    )


def _median_layer(squares: NDArray[np.float64]) -> float:
    return float(np.median(squares.mean(axis=0)))
