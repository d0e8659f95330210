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


@dataclass(frozen=True)
class FullModel:
    """The full model's scores on held-out text and look-ups, with the full rows of `plan`.

    `settings`: for the maximum number of windows. `text`: tokens (default: the shipped held-out
    text). Scores are computed on first use, which raises PopError and StoppedError. A later use
    continues after a stop.
    """

    runner: TrialRunner
    plan: Plan
    settings: QualitySettings
    text: TextTokens | None = None
    _scores: list[FullScores] = field(default_factory=list)
    _answers: Answers = field(default_factory=list)
    _references: dict[int, LookupReference] = field(default_factory=dict)

    @cached_property
    def deep_shares(self) -> dict[DeepRows, float]:
        """Return the share of the text's tokens that each rule runs deep."""
        with self.runner.opened(self.plan) as model:
            texts = [np.asarray(part) for part in self.text or tokenize(model, shipped_text())]
            return {
                rule: float(
                    np.mean(
                        [find_deep_rows(model.engine.context, part, rule).mean() for part in texts]
                    )
                )
                for rule in DeepRows
            }

    @cached_property
    def reference(self) -> QualityReference:
        """Return the scores of the held-out text."""
        watch, settings = self.runner.watch, self.settings
        watch.on_note("Reading held-out text in full")
        with self.runner.opened(self.plan) as model:
            tokens = self.text or tokenize(model, shipped_text())
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            settings = replace(settings, n_windows=min(settings.n_windows, max(1, n_found)))
            advance = watch.stage("Running the full model")
            return read_reference(model, tokens, settings, advance, self._scores)

    def lookups(self, n_documents: int) -> LookupReference:
        """Return the answers to the first documents' look-ups. Each document is read once."""
        if n_documents not in self._references:
            with self.runner.opened(self.plan) as model:
                advance = self.runner.watch.stage("Asking for look-ups in full")
                settings = LookupSettings(n_documents)
                found = LookupReference.read(model, settings, advance, self._answers)
                self._references[n_documents] = found
        return self._references[n_documents]
