"""Several files of one model measured against its full half, which is read only once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pop_local.engine.model import PopModel

from .forced import Pruning, forced
from .heldout import TextTokens
from .probes import (
    N_REPEATED,
    Repeated,
    measure_induction,
    n_induction_tokens,
    read_repeated,
)
from .quality import Quality, QualitySettings, choose_windows, summarize
from .windows import FullScores, Progress, Window, counting, score_full, score_pruned


@dataclass(frozen=True)
class Reference:
    """What the full model says of windows and of random tokens repeated.

    Memory: 4 * n_windows * n_continuation * n_vocab bytes, for as long as it is kept.
    """

    settings: QualitySettings
    windows: tuple[Window, ...]
    full: tuple[FullScores, ...]
    repeated: Repeated

    def with_draws(self, n_draws: int) -> "Reference":
        """With the first of the draws only."""
        kept = self.repeated
        return replace(
            self,
            settings=replace(self.settings, n_draws=min(n_draws, self.settings.n_draws)),
            repeated=Repeated(kept.draws[:n_draws], kept.first[:n_draws], kept.full[:n_draws]),
        )


def read_reference(
    model: PopModel, text_tokens: TextTokens, settings: QualitySettings, on_progress: Progress
) -> Reference:
    """Raises PopError when the text is too short, or nothing would be pruned."""
    with forced(model) as reader:
        windows = choose_windows(reader, text_tokens, settings)
        total = sum(window.n_tokens for window in windows) + n_induction_tokens(settings.n_draws, 0)
        ran = counting(total, on_progress)
        full = []
        for window in windows:
            full.append(score_full(reader, window))
            ran(window.n_tokens)
        repeated = read_repeated(reader, settings.n_draws, settings.seed, ran)
    return Reference(settings, windows, tuple(full), repeated)


def measure_against(
    reference: Reference, model: PopModel, boundaries: Sequence[int], on_progress: Progress
) -> tuple[Quality, ...]:
    """Each boundary of a file of the same model; at others than the file's: own projections.

    `on_progress` gets (done_tokens, total_tokens). Raises PopError as `measure_prunings` does.
    """
    settings = reference.settings
    n_tokens = sum(window.n_tokens for window in reference.windows)
    n_repeated = 2 * N_REPEATED * len(reference.repeated.draws)
    ran = counting(len(boundaries) * (n_tokens + n_repeated), on_progress)
    found = []
    with forced(model) as reader:
        for boundary in boundaries:
            pruning = Pruning(boundary, settings.mode)
            scores = []
            for window, full in zip(reference.windows, reference.full, strict=True):
                scores.append(score_pruned(reader, window, full, pruning))
                ran(window.n_tokens)
            [induction] = measure_induction(reader, reference.repeated, [pruning], ran)
            found.append(summarize(pruning, settings, reader.rule, scores, induction))
    return tuple(found)
