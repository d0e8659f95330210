"""Search for the fastest candidate within a budget.

A candidate is a boundary with its projections and deep rows. The search follows these rules:

1. Each candidate is measured with its final sidecar, first on held-out text and then on look-ups.
2. Bisection (`budget.undecided`) assumes that skipping more layers never improves quality.
   At first, bisection measures candidates only on held-out text. After a candidate fails the
   look-up test, bisection measures later candidates on held-out text and on look-ups.
3. If memory allows, each pass over the text also fits the boundaries that bisection may need next.
4. If distillation is enabled, the search distills the fastest candidate first. Candidates at deeper
   boundaries follow until one of them exceeds the budget or an error occurs.
5. Finally, the search tries `deep_rows` settings that select fewer rows. For each setting, the
   search starts at the deepest boundary within the budget. The search then tries boundaries with
   fewer skipped layers until a candidate is within the budget or is not faster than the best one.
6. The fastest candidate within the budget wins. A tie goes to a distilled candidate if its KL is
   within one standard error of the lowest KL. Otherwise, the candidate with the lowest KL wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pop_base.errors import PopError
from pop_converter.popfile.format import Budget, DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration.needs import fit_needs
from pop_local.measure import budget as budgets
from pop_local.measure.estimate import mean
from pop_local.measure.forced import Pruning
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality, Scores, measure_against
from pop_local.workflows.conversion.conversion_plan import OverBudgetError, Trial
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.trial_runner import FullModel, TrialRunner


@dataclass(eq=False)
class Candidate:
    """A plan that a search may choose, with its fit and measurements.

    `fitted` is None before fitting, and always None for `Projection.OWN`. `start` is the fit to
    distill, if any. `is_inside` is true if all results so far are within the budget (None if there
    are no results yet). `scores` are the windows' scores on the held-out text.
    """

    plan: Plan
    fitted: Fitted | None = None
    start: Fitted | None = None
    scores: list[Scores] = field(default_factory=list)
    measured: Quality | None = None
    is_inside: bool | None = None
    lookups: Lookups | None = None

    @property
    def boundary(self) -> int:
        return self.plan.boundary

    @property
    def is_ready(self) -> bool:
        return self.plan.projection == Projection.OWN or self.fitted is not None

    @property
    def quality(self) -> Quality:
        assert self.measured is not None, "not measured"
        return self.measured

    def __str__(self) -> str:
        own = " own" if self.plan.projection == Projection.OWN else ""
        distilled = " distilled" if self.plan.is_distilled else ""
        rows = "" if self.plan.deep_rows is DeepRows.NONE else f" ({self.plan.deep_rows})"
        return f"{self.boundary}{own}{distilled}{rows}"


@dataclass
class Search:
    """A search over plans sorted by the number of skipped layers.

    `plain` and `distilled` contain candidates in the same order as `plans`. `traded` contains the
    candidates with fewer deep rows than in `plans`.
    """

    runner: TrialRunner
    budget: Budget
    fitter: PlanFitter
    full: FullModel
    plans: Sequence[Plan]
    plain: list[Candidate] = field(default_factory=list)
    distilled: list[Candidate] = field(default_factory=list)
    traded: dict[str, Candidate] = field(default_factory=dict)

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(
            Trial(it.plan, it.quality, bool(it.is_inside), it.lookups) for it in self.judged
        )

    @property
    def judged(self) -> list[Candidate]:
        tried = (*self.plain, *self.distilled, *self.traded.values())
        return [it for it in tried if it.is_inside is not None]

    @property
    def inside(self) -> list[Candidate]:
        return [it for it in self.judged if it.is_inside and it.lookups is not None]

    def run(self) -> Candidate:
        """Return the fastest candidate within the budget. Its plan lists all candidates tried.

        Raises OverBudgetError, PopError, or StoppedError.
        """
        share = self.full.deep_share(self.plans[0].deep_rows)
        self.plain = [Candidate(replace(plan, deep_share=share)) for plan in self.plans]
        self.bisect()
        if self.fitter.distiller is not None:
            self.distilled = self._to_distill()
            self.distill()
        if not self.inside:
            raise self._over()
        self.trade_rows()
        best = self.fastest()
        figures = budgets.figures_in_words(best.quality, best.lookups)
        self._note(f"Boundary {best} is the fastest within the budget: {figures}")
        tried = ", ".join(f"{it} {'inside' if it.is_inside else 'outside'}" for it in self.judged)
        plan = replace(best.plan, budget=replace(self.budget, tried=tried))
        return replace(best, plan=plan)

    def fastest(self) -> Candidate:
        """Return the fastest candidate within the budget (rule 6)."""
        best = max(self.inside, key=lambda it: (it.plan.speedup_limit, -it.quality.kl_mean.value))
        for candidate in self.inside:
            if (
                candidate.plan.is_distilled
                and candidate.plan.speedup_limit == best.plan.speedup_limit
            ):
                pairs = zip(candidate.scores, best.scores, strict=True)
                more = mean(np.stack([a.divergence.kl - b.divergence.kl for a, b in pairs]))
                if more.value <= (more.se or 0):
                    return candidate
        return best

    def _note(self, text: str) -> None:
        self.runner.watch.on_note(text)

    def _over(self) -> OverBudgetError:
        shallowest = max(candidate.boundary for candidate in self.judged)
        best = [candidate for candidate in self.judged if candidate.boundary == shallowest][-1]
        n_skipped, limits = best.plan.n_skipped, budgets.limits_in_words(self.budget)
        figures = budgets.figures_in_words(best.quality, best.lookups)
        return OverBudgetError(
            f"the loss from skipping {n_skipped} layer{'s' * (n_skipped > 1)} ({figures}) exceeds"
            f" the budget ({limits})",
            self.trials,
        )

    def judge(self, candidate: Candidate) -> None:
        """Measure the candidate on held-out text."""
        if candidate.measured is not None:
            return
        self._note(f"Measuring boundary {candidate} on held-out text")
        reference = self.full.reference
        with self.runner.tried(candidate.plan, candidate.fitted) as model:
            advance = self.runner.watch.stage(f"Measuring boundary {candidate.boundary}")
            candidate.measured = measure_against(
                reference, model, Pruning(candidate.boundary), advance, candidate.scores
            )
        candidate.is_inside = budgets.is_inside(self.budget, candidate.quality)

    def settle(self, candidate: Candidate) -> bool:
        """Measure the candidate on text and look-ups. Return True if the budget is met.

        If the loss on text already exceeds the budget, the look-ups are skipped.
        """
        self.judge(candidate)
        if candidate.is_inside and candidate.lookups is None:
            reference = self.full.lookups
            with self.runner.tried(candidate.plan, candidate.fitted) as model:
                advance = self.runner.watch.stage(f"Running look-ups at boundary {candidate}")
                answers = reference.ask(model, Pruning(candidate.boundary), advance)
            candidate.lookups = reference.compare(answers)
            candidate.is_inside = budgets.keeps_lookups(self.budget, candidate.lookups)
        return bool(candidate.is_inside)

    def bisect(self) -> None:
        """Find the deepest undistilled candidate within the budget (rule 2)."""
        by_boundary = {it.boundary: it for it in self.plain}
        while True:
            verdicts = self._verdicts()
            if targets := budgets.undecided(list(by_boundary), verdicts):
                candidate = by_boundary[targets[0]]
                if not candidate.is_ready:
                    self.fit([by_boundary[it] for it in targets])
                measure = self.settle if self._ran_lookups else self.judge
                measure(candidate)
                continue
            deepest = min((it for it, passed in verdicts.items() if passed), default=None)
            # The look-ups may reverse the deepest candidate's verdict.
            if deepest is None or self.settle(by_boundary[deepest]):
                break
        tested = [it for it in self.plain if it.lookups is not None]
        failed = max((it.boundary for it in tested if not it.is_inside), default=0)
        for candidate in self.plain:
            # Candidates that passed on text alone skip more layers than one that failed.
            if candidate.is_inside and candidate.lookups is None and candidate.boundary < failed:
                candidate.is_inside = False

    @property
    def _ran_lookups(self) -> bool:
        return any(it.lookups is not None for it in self.plain)

    def _verdicts(self) -> dict[int, bool]:
        """Return the verdict on each measured boundary.

        After any candidate has run look-ups, omits candidates that have passed the text test only.
        """
        return {
            it.boundary: it.is_inside
            for it in self.plain
            if it.is_inside is not None
            and (it.lookups is not None or not (self._ran_lookups and it.is_inside))
        }

    def _to_distill(self) -> list[Candidate]:
        """Return the candidates to distill: the fastest one and all deeper ones that have a fit.

        If no candidate is within the budget, the list starts at the first measured boundary.
        """
        first = (self.fastest() if self.inside else self.judged[0]).boundary
        plain = [it for it in self.plain if it.fitted and it.boundary <= first]
        return [Candidate(replace(it.plan, is_distilled=True), start=it.fitted) for it in plain]

    def distill(self) -> None:
        """Distill the candidates in order until one exceeds the budget (rule 4)."""
        for candidate in self.distilled:
            try:
                if candidate.start is not None:
                    candidate.fitted = self.fitter.distill(candidate.plan, candidate.start)
                if not self.settle(candidate):
                    return
            except PopError as error:
                self._note(f"Skipping boundary {candidate}: {error}")
                return

    def trade_rows(self) -> None:
        """Try `deep_rows` settings that select fewer rows (rule 5).

        The search assumes that selecting fewer deep rows never improves quality.
        """
        ready = {it.boundary: it for it in (*self.plain, *self.distilled) if it.is_ready}
        start = min(it.boundary for it in self.inside)
        for rule in self.plans[0].deep_rows.fewer:
            share = self.full.deep_share(rule)
            for boundary in sorted(layer for layer in ready if layer >= start):
                base = ready[boundary]
                plan = replace(base.plan, deep_rows=rule, deep_share=share)
                if plan.speedup_limit <= self.fastest().plan.speedup_limit:
                    break
                traded = Candidate(plan, base.fitted)
                if self.settle(self.traded.setdefault(str(traded), traded)):
                    start = boundary
                    break
                start = boundary + 1

    def fit(self, candidates: Sequence[Candidate]) -> None:
        """Fit the first candidate and as many further candidates as memory allows (rule 3)."""
        missing = [candidate for candidate in candidates if not candidate.is_ready]
        plans: list[Plan] = []
        for candidate in missing:
            more = [*plans, candidate.plan]
            needs = fit_needs(more, self.fitter.options)
            if plans and len(needs.groups) > 1:
                break
            plans = more
        self.runner.require_room(plans, self.fitter.options.kv_type)
        names = ", ".join(map(str, sorted(plan.boundary for plan in plans)))
        self._note(f"Fitting the projections for boundary {names}")
        for candidate, fit in zip(missing, self.fitter.fit(plans), strict=False):
            candidate.fitted = fit
            candidate.plan = replace(candidate.plan, projection=fit.projection)
