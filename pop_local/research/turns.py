"""The loss of the second answer by pruning of the prompt, refilled in between or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pop_local.base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Predictions, divergence, predictions
from pop_local.measure.estimate import Estimate, mean
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.measure.heldout import TextTokens, spread_windows
from pop_local.measure.probes import bos
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.evaluate import EvaluationRun


@dataclass(frozen=True)
class SecondTurn:
    """Mean KL(full || pruned) in nats of the text that follows the first continuation.

    `kl_refilled`: where all rows before it, the first continuation's too, were given their depth.
    """

    n_windows: int
    kl_pruned: Estimate
    kl_refilled: Estimate


def second_turn(run: EvaluationRun) -> SecondTurn:
    """Measure the second answer at the only depth of an evaluation. Raises PopError."""
    [pruning] = run.prunings
    n_following = 2 * run.options.settings.n_continuation
    with run.opened(run.files, n_following) as (model, tokens):
        advance = run.watch.stage("Measuring the second answer")
        return measure_second_turn(model, tokens, run.options.settings, pruning, advance)


def measure_second_turn(
    model: PopModel,
    text_tokens: TextTokens,
    settings: QualitySettings,
    pruning: Pruning,
    on_progress: Progress,
) -> SecondTurn:
    """Read a context, let a text follow it for good, and score the next one, in each window.

    `on_progress` counts contexts. Raises PopError when the text is too short, or a
    context was not pruned as planned.
    """
    start = bos(model)
    n_text = settings.n_context - len(start) + 2 * settings.n_continuation
    spread = spread_windows(text_tokens, settings.n_windows, n_text)
    windows = [(*start, *window) for window in spread]
    with forced(model) as reader:
        ran = counting(len(windows) * 3, on_progress)
        kl = np.empty((2, len(windows), settings.n_continuation))
        for number, window in enumerate(windows):
            full = _second(reader, window, settings, FULL, refilled=False)
            ran(1)
            for row, refilled in enumerate((False, True)):
                predicted = _second(reader, window, settings, pruning, refilled=refilled)
                kl[row, number] = divergence(full, predicted).kl
                ran(1)
    return SecondTurn(len(windows), mean(kl[0]), mean(kl[1]))


def _second(
    reader: Forced,
    window: Sequence[int],
    settings: QualitySettings,
    pruning: Pruning,
    *,
    refilled: bool,
) -> Predictions:
    n, n_each = settings.n_context, settings.n_continuation
    reader.read(window[:n], pruning, keep_states=refilled)
    reader.follow(window[n : n + n_each])
    if refilled:
        reader.refill()
    return predictions(reader.predict(window[n + n_each :]))
