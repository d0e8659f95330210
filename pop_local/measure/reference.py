"""Several files of one model measured against its full half, which is read only once."""

from collections.abc import Sequence
from dataclasses import dataclass

from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import TextTokens
from pop_local.measure.probes import (
    Repeated,
    measure_induction,
    n_measured_tokens,
    n_read_tokens,
    read_repeated,
)
from pop_local.measure.quality import Quality, QualitySettings, choose_windows, retention, summarize
from pop_local.measure.windows import (
    FullScores,
    Progress,
    Window,
    counting,
    score_full,
    score_pruned,
)


@dataclass(frozen=True)
class Reference:
    """What the full model says of windows, and of random tokens repeated.

    It takes 4 * n_windows * n_continuation * n_vocab bytes for as long as it is kept.
    """

    settings: QualitySettings
    windows: tuple[Window, ...]
    full: tuple[FullScores, ...]
    repeated: Repeated


def read_reference(
    model: PopModel, text_tokens: TextTokens, settings: QualitySettings, on_progress: Progress
) -> Reference:
    """Run the full model over windows and random tokens.

    `on_progress` gets (done_tokens, total_tokens). Raises PopError when the text is too short, or
    nothing would be pruned.
    """
    with forced(model) as reader:
        windows = choose_windows(reader, text_tokens, settings)
        n_tokens = sum(window.n_tokens for window in windows)
        ran = counting(n_tokens + n_read_tokens(reader, settings.n_draws), on_progress)
        full = []
        for window in windows:
            full.append(score_full(reader, window))
            ran(window.n_tokens)
        repeated = read_repeated(reader, settings.n_draws, settings.seed, ran)
    return Reference(settings, windows, tuple(full), repeated)


def measure_against(
    reference: Reference, model: PopModel, boundaries: Sequence[int], on_progress: Progress
) -> tuple[Quality, ...]:
    """Measure each boundary of a file of the same model.

    At boundaries other than the file's the projections are the layers' own. `on_progress` gets
    (done_tokens, total_tokens). Raises PopError as `measure_prunings` does.
    """
    settings = reference.settings
    n_tokens = sum(window.n_tokens for window in reference.windows)
    found = []
    with forced(model) as reader:
        n_each = n_tokens + n_measured_tokens(reader, settings.n_draws)
        ran = counting(len(boundaries) * n_each, on_progress)
        for boundary in boundaries:
            pruning = Pruning(boundary, settings.mode)
            scores = []
            for window, full in zip(reference.windows, reference.full, strict=True):
                scores.append(score_pruned(reader, window, full, pruning))
                ran(window.n_tokens)
            [induction] = measure_induction(reader, reference.repeated, [pruning], ran)
            found.append(summarize(pruning, settings, reader.rule, scores, induction))
    return tuple(found)


def measure_retention(
    reference: Reference, model: PopModel, boundaries: Sequence[int], on_progress: Progress
) -> tuple[Estimate | None, ...]:
    """Measure `Quality.induction_retention` at each boundary, by random tokens alone."""
    prunings = [Pruning(boundary, reference.settings.mode) for boundary in boundaries]
    with forced(model) as reader:
        n_tokens = n_measured_tokens(reader, reference.settings.n_draws)
        ran = counting(len(prunings) * n_tokens, on_progress)
        return tuple(map(retention, measure_induction(reader, reference.repeated, prunings, ran)))
