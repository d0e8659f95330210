"""Each layer's importance for prompts and for answers, measured with virtual gates (gates.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pop_converter.architecture.shape import source_shape
from pop_converter.base.errors import PopError, UnsupportedArchitectureError
from pop_converter.gguf.source import Source
from pop_local.calibration import needs
from pop_local.measure.estimate import Estimate, mean, redrawn
from pop_local.research.hyper import read_hyper
from pop_local.research.torch_device import TorchDevice, computing, torch_device
from pop_local.workflows.events import Watch
from pop_local.workflows.hardware import Hardware

Windows = Sequence[Sequence[int]]
# Windows per batch. On a CPU, larger batches are no faster.
_N_BATCH = 4
_HINT = "use shorter windows or close other programs"


@dataclass(frozen=True)
class StageImportance:
    """The importance I_l of each layer, in squared nats, summed over a window's answer rows.

    The last third of the layers and the other layers are each summarized by a median and a mean,
    since a few layers dominate the mean. `median_ratio`: the last third's median divided by the
    other layers' median (None if the other layers' median is zero).
    """

    layers: tuple[Estimate, ...]
    last_third_median: Estimate
    others_median: Estimate
    median_ratio: Estimate | None
    last_third_mean: Estimate
    others_mean: Estimate


@dataclass(frozen=True)
class Importance:
    """Each layer's importance, measured on windows of `n_context` + `n_answer` tokens."""

    n_windows: int
    n_context: int
    n_answer: int
    prefill: StageImportance
    decode: StageImportance


def gates_device(
    source: Source, n_windows: int, n_context: int, n_answer: int, hardware: Hardware, watch: Watch
) -> TorchDevice | None:
    """Return the device for the gates, or warn and return None if the gates cannot be computed.

    Raises PopError if windows of `n_context` + `n_answer` tokens do not fit in memory.
    """
    try:
        device = torch_device(hardware, "layer importance cannot be measured")
    except PopError as error:
        watch.on_warning(error)
        return None
    try:
        hyper = read_hyper(source)
    except UnsupportedArchitectureError as error:
        watch.on_warning(
            PopError(f"layer importance cannot be measured: {error.message}", error.hint)
        )
        return None
    from pop_local.research.gates import needed_bytes

    shape, n_batch = source_shape(source), min(_N_BATCH, n_windows)
    needed = needed_bytes(shape, hyper, n_context + n_answer, n_answer, n_batch)
    if device.name == "cpu":  # torch reports a lack of GPU memory
        needs.require_memory("the gates need", needed, _HINT, cause="no-memory-for-gates")
    return device


def importance(
    source: Source, device: TorchDevice, windows: Windows, n_context: int, seed: int, watch: Watch
) -> Importance:
    """Measure the importance of each layer on windows of equal length.

    If the model has a BOS token, the windows must start with it. `n_context`: the number of context
    tokens per window. Raises PopError or StoppedError.
    """
    from pop_local.research.decoder import Decoder
    from pop_local.research.gates import gate_gradients

    tokens = np.array(windows, np.int32)
    stage = watch.stage("Virtual gates")
    with computing("the gates", _HINT, cause="no-memory-for-gates"):
        decoder = Decoder(source, device.name)
        prefill, decode = gate_gradients(
            decoder, tokens, n_context, n_batch=_N_BATCH, seed=seed, on_progress=stage
        )
    return Importance(
        n_windows=len(tokens),
        n_context=n_context,
        n_answer=tokens.shape[1] - n_context,
        prefill=stage_of(prefill**2),
        decode=stage_of(decode**2),
    )


def stage_of(squares: NDArray[np.float64]) -> StageImportance:
    """Summarize the squared gradients [n_windows, n_layer] of all layers."""
    n_layer = squares.shape[1]
    n_others = n_layer - max(1, n_layer // 3)
    last, others = squares[:, n_others:], squares[:, :n_others]

    def median_ratio(drawn: NDArray[np.float64]) -> float:
        return _median_layer(drawn[:, n_others:]) / _median_layer(drawn[:, :n_others])

    return StageImportance(
        layers=tuple(mean(squares[:, layer]) for layer in range(n_layer)),
        last_third_median=redrawn(last, _median_layer),
        others_median=redrawn(others, _median_layer),
        median_ratio=redrawn(squares, median_ratio) if _median_layer(others) else None,
        last_third_mean=mean(last),
        others_mean=mean(others),
    )


def _median_layer(squares: NDArray[np.float64]) -> float:
    return float(np.median(squares.mean(axis=0)))
