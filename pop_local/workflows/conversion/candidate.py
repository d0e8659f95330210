"""A search's candidates, and the judge that compares each candidate's loss with the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pop_converter.popfile.format import Budget, DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.measure import budget as budgets
from pop_local.measure.forced import Pruning
from pop_local.measure.gradual import Gradual
from pop_local.measure.lookups import Answers, Lookups, LookupSettings
from pop_local.measure.quality import Quality
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.refusals import Trial
from pop_local.workflows.conversion.trial_runner import TrialRunner

# With 16 windows, the mean KL has a relative standard error of 20 % or less.
N_WINDOWS = 16
# The number of look-up documents, and the number after which a clear loss ends the measurement.
N_DOCUMENTS = 10
N_SCREENED = 2


@dataclass(eq=False)
class Candidate:
    """A plan that a search may choose, and the plan's fit and measurements so far.

    `fitted`: the fit (None before fitting, and always None for `Projection.OWN`). `start`: the fit
    from which distilling starts. `is_inside`: whether the budget currently accepts the candidate
    (None before the first measurement). `gradual` and `answers` let a resumed search continue.
    """

    plan: Plan
    fitted: Fitted | None = None
    start: Fitted | None = None
    gradual: Gradual | None = None
    is_inside: bool | None = None
    lookups: Lookups | None = None
    answers: Answers = field(default_factory=list)

    @property
    def boundary(self) -> int:
        return self.plan.boundary

    @property
    def is_ready(self) -> bool:
        return self.plan.projection == Projection.OWN or self.fitted is not None

    @property
    def scores(self) -> Gradual:
        assert self.gradual is not None, "not measured"
        return self.gradual

    @property
    def quality(self) -> Quality:
        assert self.scores.quality is not None, "not measured"
        return self.scores.quality

    @property
    def trial(self) -> Trial:
        return Trial(self.plan, self.quality, bool(self.is_inside), self.lookups)

    def __str__(self) -> str:
        own = " own" if self.plan.projection == Projection.OWN else ""
        distilled = " distilled" if self.plan.is_distilled else ""
        rows = "" if self.plan.deep_rows is DeepRows.NONE else f" ({self.plan.deep_rows})"
        return f"{self.boundary}{own}{distilled}{rows}"


@dataclass(frozen=True)
class Judge:
    """Judge that compares candidates with the full model until a budget accepts or rejects them."""

    runner: TrialRunner
    budget: Budget
    full: FullModel

    def judge(self, candidate: Candidate) -> None:
        """Measure the candidate until more held-out windows would hardly change the verdict."""
        self._measure(candidate, lambda quality: budgets.is_clear(self.budget, quality))

    def settle(self, candidate: Candidate) -> bool:
        """Measure the candidate on all windows and on look-ups, and return the final verdict.

        A candidate that clearly exceeds the budget is rejected after fewer windows.
        """
        if candidate.lookups is not None:
            return bool(candidate.is_inside)

        def is_outside(quality: Quality) -> bool:
            is_clear = budgets.is_clear(self.budget, quality)
            return is_clear and not budgets.is_inside(self.budget, quality)

        self._measure(candidate, is_outside)
        if candidate.is_inside:
            self._look_up(candidate)
        return bool(candidate.is_inside)

    def _measure(self, candidate: Candidate, is_enough: Callable[[Quality], bool]) -> None:
        watch, boundary = self.runner.watch, candidate.boundary
        gradual = candidate.gradual = candidate.gradual or Gradual(self.full.reference, boundary)
        if not gradual.settled(is_enough):
            watch.on_note(f"Measuring boundary {candidate} on held-out text")
            begin = partial(watch.stage, f"Measuring boundary {boundary}")
            with self.runner.tried(candidate.plan, candidate.fitted) as model:
                gradual.measure_until(is_enough, model, begin)
        candidate.is_inside = budgets.is_inside(self.budget, candidate.quality)

    def _look_up(self, candidate: Candidate) -> None:
        """Run a few documents' look-ups, and then all look-ups unless too many answers are lost."""
        n_questions = N_DOCUMENTS * LookupSettings().n_per_document
        for n_documents in sorted({min(N_SCREENED, N_DOCUMENTS), N_DOCUMENTS}):
            reference = self.full.lookups(n_documents)
            with self.runner.tried(candidate.plan, candidate.fitted) as model:
                advance = self.runner.watch.stage(f"Running look-ups, boundary {candidate}")
                reference.ask(model, Pruning(candidate.boundary), advance, candidate.answers)
            lookups = reference.compare(candidate.answers)
            candidate.is_inside = budgets.keeps_lookups(self.budget, lookups)
            if budgets.has_lost(self.budget, lookups, n_questions):
                break
        candidate.lookups = lookups
