"""One boundary measured a few windows at a time, so that one may stop when they are enough."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pop_converter.base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Floats
from pop_local.measure.estimate import Estimate, mean
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.probes import measure_induction
from pop_local.measure.quality import (
    Quality,
    QualityReference,
    Scores,
    score,
    summarize,
)

# After so many windows, and after twice as many each time, it is asked whether they are enough.
N_FIRST_WINDOWS = 4


@dataclass
class Gradual:
    """A boundary's scores so far, against a reference that was read at once.

    `quality` is their summary, None before the first are measured.
    """

    reference: QualityReference
    boundary: int
    quality: Quality | None = None
    _scores: list[Scores] = field(default_factory=list)
    _repeated_nll: Floats | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all windows of the reference are measured."""
        return len(self._scores) == len(self.reference.windows)

    def kl_over(self, other: "Gradual") -> Estimate:
        """Return how much larger the KL is than another's, on the windows that both have."""
        pairs = zip(self._scores, other._scores, strict=False)
        return mean(np.stack([a.divergence.kl - b.divergence.kl for a, b in pairs]))

    def settled(self, is_enough: Callable[[Quality], bool]) -> Quality | None:
        """`quality`, if it is of all windows, or if `is_enough` accepts it; else None."""
        found = self.quality
        return found if found and (self.is_whole or is_enough(found)) else None

    def measure_until(
        self,
        is_enough: Callable[[Quality], bool],
        model: PopModel,
        begin: Callable[[], Progress],
    ) -> Quality:
        """Measure until it is `settled`; `begin` gives what follows each step.

        Raises PopError as `measure` does.
        """
        while not (found := self.settled(is_enough)):
            self.measure(model, begin())
        return found

    def measure(self, model: PopModel, on_progress: Progress) -> None:
        """Measure four windows that are spread over the text, later as many as before.

        `model`: a file of the reference's model, always with the same projections. `on_progress`
        counts windows and draws of this call. Raises PopError as `measure_prunings` does.
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
                [self._repeated_nll] = measure_induction(reader, reference.repeated, [pruning], ran)
            for window, of_full in zip(windows, full, strict=True):  # a stop keeps those before it
                self._scores += score(reader, [window], [of_full], [pruning], ran)[0]
            self.quality = summarize(
                pruning,
                reference.settings,
                reader.rule,
                self._scores,
                reference.repeated,
                self._repeated_nll,
            )
