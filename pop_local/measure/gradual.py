"""Measure one boundary in steps of a few windows, until the verdict is clear."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pop_converter.base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Floats
from pop_local.measure.estimate import Estimate, mean
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.probes import measure_induction
from pop_local.measure.quality import Quality, QualityReference, Scores, score, summarize

# Windows of the first step; each further step doubles the number of measured windows.
N_FIRST_WINDOWS = 4


@dataclass
class Gradual:
    """The scores of a boundary on the windows measured so far, compared with the full model.

    `quality`: the summary of the scores (None before the first step).
    """

    reference: QualityReference
    boundary: int
    quality: Quality | None = None
    _scores: list[Scores] = field(default_factory=list)
    _repeated_nll: Floats | None = None

    @property
    def is_whole(self) -> bool:
        return len(self._scores) == len(self.reference.windows)

    def kl_over(self, other: "Gradual") -> Estimate:
        """Return this boundary's KL minus the other's, on the windows that both have measured."""
        pairs = zip(self._scores, other._scores, strict=False)
        return mean(np.stack([a.divergence.kl - b.divergence.kl for a, b in pairs]))

    def settled(self, is_enough: Callable[[Quality], bool]) -> Quality | None:
        """Return `quality` if it covers all windows or `is_enough` accepts it, otherwise None."""
        found = self.quality
        return found if found and (self.is_whole or is_enough(found)) else None

    def measure_until(
        self,
        is_enough: Callable[[Quality], bool],
        model: PopModel,
        begin: Callable[[], Progress],
    ) -> Quality:
        """Measure until the quality is settled; `begin` returns each step's progress callback."""
        while not (found := self.settled(is_enough)):
            self.measure(model, begin())
        return found

    def measure(self, model: PopModel, on_progress: Progress) -> None:
        """Measure the first four windows, or double the number of measured windows.

        `model`: the reference's model, opened with the same projections in each call. `on_progress`
        counts the windows and draws of this call. Raises the errors of `measure_pruning`.
        """
        reference, n_done = self.reference, len(self._scores)
        pruning = Pruning(self.boundary)
        n_draws = reference.settings.n_draws if self._repeated_nll is None else 0
        pairs = list(zip(reference.windows, reference.full, strict=True))
        order = sorted(range(len(pairs)), key=lambda i: (i % 4 > 0, i % 2 > 0))
        order = order[n_done : max(N_FIRST_WINDOWS, 2 * n_done)]
        windows, full = [pairs[i][0] for i in order], [pairs[i][1] for i in order]
        with forced(model) as reader:
            ran = counting(len(windows) + n_draws, on_progress)
            if self._repeated_nll is None:
                self._repeated_nll = measure_induction(reader, reference.repeated, pruning, ran)
            # Each window is added separately, so that a stop keeps the measured windows.
            for window, of_full in zip(windows, full, strict=True):
                self._scores += score(reader, [window], [of_full], pruning, ran)
            self.quality = summarize(
                pruning, reference.settings, self._scores, reference.repeated, self._repeated_nll
            )
