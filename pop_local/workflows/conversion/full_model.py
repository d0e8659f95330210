"""The full model's results on held-out text and look-ups, computed on first use."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_local.engine.depth.deep_rows import find_deep_rows
from pop_local.measure.heldout import TextTokens, room, shipped_text, tokenize
from pop_local.measure.lookups import Answers, LookupReference, LookupSettings
from pop_local.measure.quality import FullScores, QualityReference, QualitySettings, read_reference
from pop_local.workflows.conversion.trial_runner import TrialRunner

# With 16 windows, the mean KL has a relative standard error of 20% or less.
N_WINDOWS = 16
N_DOCUMENTS = 10


@dataclass(frozen=True)
class FullModel:
    """The full model's scores on held-out text and look-ups, computed with the plan's full rows.

    `settings` contains the maximum number of windows. `text` is the text to score (default: the
    shipped held-out text). Computing the scores on first use may raise PopError or StoppedError.
    If the computation is stopped, it resumes when the scores are used again.
    """

    runner: TrialRunner
    plan: Plan
    settings: QualitySettings
    text: TextTokens | None = None
    _scores: list[FullScores] = field(default_factory=list)
    _answers: Answers = field(default_factory=list)

    def deep_share(self, rule: DeepRows) -> float:
        """Return the fraction of the text's tokens that `rule` selects."""
        if rule is DeepRows.NONE:
            return 0.0
        with self.runner.opened(self.plan) as model:
            texts = [np.asarray(part) for part in self.text or tokenize(model, shipped_text())]
            shares = [find_deep_rows(model.engine.context, part, rule).mean() for part in texts]
            return float(np.mean(shares))

    @cached_property
    def reference(self) -> QualityReference:
        """Return the full model's scores on the held-out text."""
        watch, settings = self.runner.watch, self.settings
        watch.on_note("Measuring the full model on held-out text")
        with self.runner.opened(self.plan) as model:
            tokens = self.text or tokenize(model, shipped_text())
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            settings = replace(settings, n_windows=min(settings.n_windows, max(1, n_found)))
            advance = watch.stage("Running the full model")
            return read_reference(model, tokens, settings, advance, self._scores)

    @cached_property
    def lookups(self) -> LookupReference:
        """Return the full model's answers to the look-up questions."""
        with self.runner.opened(self.plan) as model:
            advance = self.runner.watch.stage("Running look-ups on the full model")
            settings = LookupSettings(N_DOCUMENTS)
            return LookupReference.read(model, settings, advance, self._answers)
