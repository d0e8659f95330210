"""The fastest recipe within a budget: fits and measures candidates until it is known.

That is the deepest boundary inside, unless deeper ones are once they are distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial

from pop_converter.base.errors import PopError
from pop_converter.popfile.format import Budget
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration.needs import fit_needs, spaced
from pop_local.calibration.state import kept_boundaries
from pop_local.measure import budget as budgets
from pop_local.measure.forced import Pruning
from pop_local.measure.gradual import Gradual
from pop_local.measure.lookups import Answers, Lookups, LookupSettings
from pop_local.measure.quality import Quality, QualitySettings
from pop_local.workflows.conversion.fits import Fitter
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.named import Examination
from pop_local.workflows.conversion.plan import ConversionRun, Outcome
from pop_local.workflows.conversion.refusals import OverBudgetError, Trial
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.measuring import measured

# Their mean KL has a standard error of a fifth or less.
N_WINDOWS = 16
# Documents whose look-ups are asked, and those after which clear losses end it.
N_DOCUMENTS = 10
N_SCREENED = 2
# Boundaries past one that is distilled for which the text that is read in full serves, too.
N_DEEPER = 3


class Stage(Enum):
    """The fits that a boundary may be tried with."""

    OWN = auto()
    SEARCHED = auto()
    DISTILLED = auto()


@dataclass(eq=False)
class Candidate:
    """A boundary at one stage, and all that is known of it.

    `fitted` is None before the fit, and for own projections. `is_inside` is the verdict so far.
    `answers` to look-ups are kept when a search is stopped.
    """

    plan: Plan
    fitted: Fitted | None = None
    gradual: Gradual | None = None
    is_inside: bool | None = None
    lookups: Lookups | None = None
    answers: Answers = field(default_factory=list)

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
        return f"{self.plan.boundary}{' distilled' if self.plan.is_distilled else ''}"


def write_deepest(run: ConversionRun, budget: Budget) -> Outcome:
    """Choose the deepest plan of a conversion within the budget, and write it.

    Raises OverBudgetError, PopError, StoppedError.
    """
    planned, is_named = run.conversion, run.conversion.goal.is_named
    if any(plan.projection != Projection.OWN for plan in planned.plans):
        # A search finds out by itself which boundaries cannot copy.
        examined = Examination(run.bench, planned.deepest, allow_broken_copy=not is_named)
        examined.before_fit()
    with run.resumable(keeps_refused=is_named):
        full = FullModel(run.bench, planned.plans[0], QualitySettings(N_WINDOWS))
        search = Search(run.bench, budget, run.fitter(full), full, planned.plans)
        chosen = search.run()
        found = measured(chosen.quality, chosen.lookups)
        return run.write_measured(chosen.plan, chosen.fitted, found, search.trials)


@dataclass
class Search:
    """One search. `tried` has its candidates; those of SEARCHED from the shallowest plan on.

    Where the sums of all would take too much memory, few boundaries are fitted: deeper ones than
    own projections pass at, in one pass over the text.
    """

    bench: TrialRunner
    budget: Budget
    fitter: Fitter
    full: FullModel
    plans: Sequence[Plan]
    tried: dict[tuple[int, Stage], Candidate] = field(init=False)

    def __post_init__(self) -> None:
        self.tried = {(plan.boundary, Stage.SEARCHED): Candidate(plan) for plan in self.plans}

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(each.trial for each in self._judged)

    @property
    def _judged(self) -> list[Candidate]:
        return [each for each in self.tried.values() if each.is_inside is not None]

    def run(self) -> Candidate:
        """Return the fastest candidate inside, whose plan says what was tried."""
        if self._is_large():
            self._leave_few()
        self._deepest_inside()
        if self.fitter.distiller is not None:
            self._try_distilled()
        if not any(each.is_inside for each in self._judged):
            raise self._over()
        chosen = self._fastest()
        figures = budgets.figures_in_words(chosen.quality, chosen.lookups)
        self._note(f"Boundary {chosen} is the fastest within the budget: {figures}")
        tried = ", ".join(
            f"{each}{' own' * (stage is Stage.OWN)} {'inside' if each.is_inside else 'outside'}"
            for (_, stage), each in self.tried.items()
            if each.is_inside is not None
        )
        plan = replace(chosen.plan, budget=replace(self.budget, tried=tried))
        return replace(chosen, plan=plan)

    def _fastest(self) -> Candidate:
        """Return the fastest inside; where some are as fast, the one with the smallest KL.

        But a distilled one comes first unless its KL is larger by more than the error of that.
        """
        inside = [each for each in self._judged if each.is_inside]
        best = max(inside, key=lambda it: (it.plan.speedup_limit, -it.quality.kl_mean.value))
        for each in inside:
            if each.plan.is_distilled and each.plan.speedup_limit == best.plan.speedup_limit:
                more = each.scores.kl_over(best.scores)
                if more.value <= (more.se or 0):
                    return each
        return best

    def _note(self, text: str) -> None:
        self.bench.watch.on_note(text)

    def _past(self, boundary: int) -> list[int]:
        found = (each for each, stage in self.tried if stage is Stage.SEARCHED)
        return sorted((each for each in found if each < boundary), reverse=True)

    # Few boundaries of a large model

    def _is_large(self) -> bool:
        fitted = [plan for plan in self.plans if plan.projection != Projection.OWN]
        return len(self._spaced(fitted)) < len(fitted)

    def _spaced(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return spaced(plans, self.bench.source, self.fitter.options)

    def _leave_few(self) -> None:
        """Measure own projections if they may be taken, and leave few plans that may win more."""
        plans, own = list(self.plans), {}
        if self.fitter.options.projection is None:
            self._note("Measuring own projections first, since fits at each boundary take memory")
            search = replace(self, plans=[replace(it, projection=Projection.OWN) for it in plans])
            deepest = search._deepest_inside()
            own = {(each.plan.boundary, Stage.OWN): each for each in search._judged}
            hopeless = [
                each.plan.boundary
                for each in own.values()
                if budgets.is_hopeless(each.quality.induction_retention)
            ]
            shallowest = plans[0].boundary + 1 if deepest is None else deepest
            plans = [
                it
                for it in plans
                if max(hopeless, default=0) < it.boundary < shallowest
                and it.projection != Projection.OWN
            ]
        self.plans = self._spaced(plans)
        self.tried = own | {(it.boundary, Stage.SEARCHED): Candidate(it) for it in self.plans}

    # The deepest boundary inside

    def _deepest_inside(self) -> int | None:
        while True:
            verdicts = {
                boundary: bool(each.is_inside)
                for (boundary, stage), each in self.tried.items()
                if stage is Stage.SEARCHED and each.is_inside is not None
            }
            if wanted := budgets.undecided([plan.boundary for plan in self.plans], verdicts):
                candidate = self._searched(wanted[0])
                if not candidate.is_ready:
                    self._fit(wanted)
                self._judge(candidate, lambda quality: budgets.is_clear(self.budget, quality))
                continue
            deepest = budgets.deepest_inside(verdicts)
            if deepest is None:
                return None
            candidate = self._searched(deepest)
            if candidate.lookups is not None:
                return deepest
            # On all windows, and by look-ups, it may be outside after all.
            self._settle(candidate)

    def _searched(self, boundary: int) -> Candidate:
        return self.tried[boundary, Stage.SEARCHED]

    def _fit(self, wanted: Sequence[int]) -> None:
        """Fit the first of `wanted`, with others in the same pass over the text."""
        options = self.fitter.options
        options = options if len(self.plans) == 1 else options.at(wanted[0])
        # A fit that is there goes on, whatever memory is free now.
        kept = kept_boundaries(options.state_path) if options.state_path else ()
        is_ours = wanted[0] in kept and all((each, Stage.SEARCHED) in self.tried for each in kept)
        fitted = [self._searched(each) for each in (kept if is_ours else self._room_for(wanted))]
        plans = [each.plan for each in fitted]
        self.bench.require_room(plans, options.kv_type)
        names = ", ".join(map(str, sorted(plan.boundary for plan in plans)))
        self._note(f"Fitting the projections for boundary {names}")
        made = self.fitter.fit(plans, options.state_path)
        for candidate, fit in zip(fitted, made, strict=True):
            candidate.fitted = fit
            candidate.plan = replace(candidate.plan, projection=fit.projection)
            candidate.gradual = self.fitter.seen.get((candidate.plan.boundary, fit.projection))

    def _room_for(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Return the first of `wanted`, and as many others as fit into memory beside it."""
        chosen: list[int] = []
        for boundary in wanted:
            if self._searched(boundary).is_ready:
                continue
            plans = [self._searched(each).plan for each in (*chosen, boundary)]
            needs = fit_needs(plans, self.bench.source, self.fitter.options)
            if chosen and len(needs.groups) > 1:
                break
            chosen.append(boundary)
        return tuple(chosen)

    # Deeper ones, with other fits

    def _try_distilled(self) -> None:
        """Try distilled fits: the fastest, then deeper ones while they pass.

        Where no fit passes, the shallowest is the first. One that loses a few look-ups too many
        does not end it, since another fit may keep them; a second one does. When distilling fails,
        what was found without it stays.
        """
        judged = {key: each for key, each in self.tried.items() if each.is_inside is not None}
        fastest = self._fastest() if any(each.is_inside for each in self._judged) else None
        boundary, _ = next(key for key, each in judged.items() if fastest in (None, each))
        has_lost_few = False
        for each in (boundary, *self._past(boundary)):
            plain = self.tried.get((each, Stage.SEARCHED))
            if plain is None or plain.fitted is None:
                continue
            candidate = Candidate(replace(plain.plan, is_distilled=True))
            n_deeper = min(N_DEEPER, len(self._past(each)))
            try:
                candidate.fitted = self.fitter.distilled(candidate.plan, plain.fitted, n_deeper)
                is_inside = self._settle(candidate)
            except PopError as error:
                self._note(f"Distilling is left out: {error}")
                return
            self.tried[each, Stage.DISTILLED] = candidate
            if is_inside:
                continue
            # Look-ups are asked for where everything else is inside.
            lookups = candidate.lookups
            if has_lost_few or lookups is None or not budgets.is_open(self.budget, lookups):
                return
            has_lost_few = True

    # Verdicts

    def _settle(self, candidate: Candidate) -> bool:
        """Measure a candidate until it is clearly outside, else in whole, then by look-ups."""

        def is_outside(quality: Quality) -> bool:
            is_clear = budgets.is_clear(self.budget, quality)
            return is_clear and not budgets.is_inside(self.budget, quality)

        self._judge(candidate, is_outside)
        if candidate.is_inside:
            self._ask(candidate)
        return bool(candidate.is_inside)

    def _judge(self, candidate: Candidate, is_enough: Callable[[Quality], bool]) -> None:
        """Measure a candidate until that is enough, and judge it."""
        boundary = candidate.plan.boundary
        gradual = candidate.gradual = candidate.gradual or Gradual(self.full.reference, boundary)
        if not gradual.settled(is_enough):
            self._note(f"Measuring boundary {candidate} on held-out text")
            begin = partial(self.bench.watch.stage, f"Measuring boundary {boundary}")
            with self.bench.tried(candidate.plan, candidate.fitted) as model:
                gradual.measure_until(is_enough, model, begin)
        candidate.is_inside = budgets.is_inside(self.budget, candidate.quality)

    def _ask(self, candidate: Candidate) -> None:
        """Ask for look-ups of a few documents, of all unless too many are lost, and judge."""
        n_questions = N_DOCUMENTS * LookupSettings().n_per_document
        for n_documents in sorted({min(N_SCREENED, N_DOCUMENTS), N_DOCUMENTS}):
            reference = self.full.lookups(n_documents)
            with self.bench.tried(candidate.plan, candidate.fitted) as model:
                advance = self.bench.watch.stage(f"Asking for look-ups, boundary {candidate}")
                pruning = Pruning(candidate.plan.boundary)
                reference.ask(model, pruning, advance, candidate.answers)
            lookups = candidate.lookups = reference.compare(candidate.answers)
            candidate.is_inside = budgets.keeps_lookups(self.budget, lookups)
            if budgets.has_lost(self.budget, lookups, n_questions):
                return

    def _over(self) -> OverBudgetError:
        shallowest = max(each.plan.boundary for each in self._judged)
        best = [each for each in self._judged if each.plan.boundary == shallowest][-1]
        n_skipped, limits = best.plan.n_skipped, budgets.limits_in_words(self.budget)
        return OverBudgetError(
            f"{n_skipped} skipped layer{'s' * (n_skipped > 1)} lose{'s' * (n_skipped == 1)} more"
            f" than the budget allows ({limits}):"
            f" {budgets.figures_in_words(best.quality, best.lookups)}",
            self.trials,
        )
