"""Search for the fastest candidate within a budget: one ladder of stages.

A candidate is a boundary, a fit and a rule for deep rows. STAGES lists the stages in order: which
candidates each one tries, and in which order. The rules:

1. A candidate is measured as it would be written: on held-out text first, with look-ups last.
2. Clear verdicts need few windows. The chosen candidate was measured on all of them.
3. Bisection assumes that deeper is never better. It starts in the middle (`budget.undecided`).
4. Boundaries that bisection may need next are fitted in the same pass, if memory allows.
5. If the sums of all fits would exceed MOST_SUMS_BYTES, the layers' own projections are tried
   first. Then a few deeper boundaries, evenly spaced, are fitted in one pass.
6. A walk starts at the fastest candidate so far. It goes one boundary deeper at a time until a
   candidate exceeds the budget. If a step fails, such as for lack of memory, the earlier results
   remain valid.
7. Deep rows restore look-ups and cost time. The last stage trades them for layers: each rule with
   fewer rows is tried at the deepest boundary within the budget, then at shallower boundaries. It
   stops at the first candidate within the budget, or if no other candidate would be the fastest.
   Fewer rows are never better at the same boundary.
8. The fastest candidate within the budget is chosen. Among equally fast candidates, a distilled
   candidate is preferred unless its KL is larger beyond the error, else the smallest KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.popfile.format import Budget, DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import Projection
from pop_local.calibration.needs import fit_needs, spaced
from pop_local.calibration.state import kept_boundaries
from pop_local.measure import budget as budgets
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.conversion import candidate as candidates
from pop_local.workflows.conversion.candidate import Candidate, Judge
from pop_local.workflows.conversion.conversion_plan import ConversionRun, Outcome
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.named import Examination, require_windows
from pop_local.workflows.conversion.refusals import OverBudgetError, Trial
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.measuring import measured

# Deeper boundaries whose distilling shares the text that is read for one boundary.
N_DEEPER = 3


@dataclass(frozen=True)
class SearchStage:
    """A stage of the search.

    `candidates` returns the candidates to try, the shallowest first. `order` tries them. `prepare`
    fits the first candidate, and more candidates if that saves work.
    """

    candidates: Callable[[Search], Iterable[Candidate]]
    order: Callable[[Search, SearchStage, Sequence[Candidate]], None]
    prepare: Callable[[Search, Sequence[Candidate]], None]


def write_within(run: ConversionRun, budget: Budget) -> Outcome:
    """Write the fastest plan of a conversion within the budget.

    Raises OverBudgetError, PopError, StoppedError.
    """
    planned, is_named = run.conversion, run.conversion.is_named
    if any(plan.projection != Projection.OWN for plan in planned.plans):
        if is_named:
            Examination(run.runner, planned.deepest, allow_broken_copy=False).before_fit()
        else:
            require_windows(run.runner, planned.deepest)
    with run.resumable(keeps_refused=is_named):
        full = FullModel(run.runner, planned.plans[0], QualitySettings(candidates.N_WINDOWS))
        search = Search(run.runner, budget, run.fitter(), full, planned.plans)
        chosen = search.run()
        found = measured(chosen.quality, chosen.lookups)
        return run.write(chosen.plan, chosen.fitted, lambda _: found, search.trials)


@dataclass
class Search:
    """A search among plans, the shallowest first.

    `rungs`: each stage's candidates. After a stop, `run` continues the search.
    """

    runner: TrialRunner
    budget: Budget
    fitter: PlanFitter
    full: FullModel
    plans: Sequence[Plan]
    rungs: list[list[Candidate]] = field(default_factory=list)

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(each.trial for each in self.judged)

    @property
    def judged(self) -> list[Candidate]:
        return [each for rung in self.rungs for each in rung if each.is_inside is not None]

    @property
    def inside(self) -> list[Candidate]:
        return [each for each in self.judged if each.is_inside]

    @property
    def judge(self) -> Judge:
        return Judge(self.runner, self.budget, self.full)

    def run(self) -> Candidate:
        """Return the fastest candidate within the budget; its plan names all tried candidates.

        Raises OverBudgetError, PopError, StoppedError.
        """
        for number, stage in enumerate(STAGES):
            if number == len(self.rungs):
                self.rungs.append(list(stage.candidates(self)))
            stage.order(self, stage, self.rungs[number])
        if not self.inside:
            raise self._over()
        chosen = self.fastest()
        figures = budgets.figures_in_words(chosen.quality, chosen.lookups)
        self._note(f"Boundary {chosen} is the fastest within the budget: {figures}")
        tried = ", ".join(
            f"{each} {'inside' if each.is_inside else 'outside'}" for each in self.judged
        )
        plan = replace(chosen.plan, budget=replace(self.budget, tried=tried))
        return replace(chosen, plan=plan)

    def fastest(self) -> Candidate:
        """Return the fastest candidate within the budget (rule 8)."""
        best = max(self.inside, key=lambda it: (it.plan.speedup_limit, -it.quality.kl_mean.value))
        for each in self.inside:
            if each.plan.is_distilled and each.plan.speedup_limit == best.plan.speedup_limit:
                more = each.scores.kl_over(best.scores)
                if more.value <= (more.se or 0):
                    return each
        return best

    def _note(self, text: str) -> None:
        self.runner.watch.on_note(text)

    def _over(self) -> OverBudgetError:
        shallowest = max(each.boundary for each in self.judged)
        best = [each for each in self.judged if each.boundary == shallowest][-1]
        n_skipped, limits = best.plan.n_skipped, budgets.limits_in_words(self.budget)
        return OverBudgetError(
            f"{n_skipped} skipped layer{'s' * (n_skipped > 1)} lose{'s' * (n_skipped == 1)} more"
            f" than the budget allows ({limits}):"
            f" {budgets.figures_in_words(best.quality, best.lookups)}",
            self.trials,
        )

    # Orders

    def bisect(self, stage: SearchStage, rung: Sequence[Candidate]) -> None:
        """Find the deepest candidate within the budget (rule 3)."""
        by_boundary = {each.boundary: each for each in rung}
        while True:
            verdicts = {it.boundary: it.is_inside for it in rung if it.is_inside is not None}
            if wanted := budgets.undecided(list(by_boundary), verdicts):
                candidate = by_boundary[wanted[0]]
                if not candidate.is_ready:
                    stage.prepare(self, [by_boundary[each] for each in wanted])
                self.judge.judge(candidate)
                continue
            deepest = budgets.deepest_inside(verdicts)
            # All windows and the look-ups may reverse the verdict on the deepest.
            if deepest is None or self.judge.settle(by_boundary[deepest]):
                return

    def walk(self, stage: SearchStage, rung: Sequence[Candidate]) -> None:
        """Try one candidate after the other until one exceeds the budget (rule 6)."""
        for number, candidate in enumerate(rung):
            try:
                if not candidate.is_ready:
                    stage.prepare(self, rung[number:])
                if not self.judge.settle(candidate):
                    return
            except PopError as error:
                self._note(f"Skipping boundary {candidate}: {error}")
                return

    def trade(self, stage: SearchStage, rung: Sequence[Candidate]) -> None:
        """Find each rule's deepest candidate within the budget, if it is the fastest (rule 7)."""
        deepest = dict.fromkeys(DeepRows, 0)
        for candidate in rung:
            rule, limit = candidate.plan.deep_rows, self.fastest().plan.speedup_limit
            if candidate.boundary < deepest[rule]:
                continue
            if candidate.is_inside is None and candidate.plan.speedup_limit <= limit:
                continue
            is_inside = self.judge.settle(candidate)
            least = candidate.boundary + (not is_inside)
            deepest |= {fewer: max(least, deepest[fewer]) for fewer in rule.fewer}
            if is_inside:
                deepest[rule] = candidate.plan.shape.n_layer

    # Candidates

    def _with_rows(self, plan: Plan, rule: DeepRows) -> Plan:
        share = 0.0 if rule is DeepRows.NONE else self.full.deep_shares[rule]
        return replace(plan, deep_rows=rule, deep_share=share)

    def own(self) -> list[Candidate]:
        """Return a large model's unfitted candidates by boundary, if the options allow them."""
        fitted = [plan for plan in self.plans if plan.projection != Projection.OWN]
        if self.fitter.options.projection is not None or len(self._spaced(fitted)) == len(fitted):
            return []
        self._note(
            "Measuring the layers' own projections first, since fitting all boundaries needs more"
            " memory"
        )
        plans = [replace(plan, projection=Projection.OWN) for plan in self.plans]
        return [Candidate(self._with_rows(plan, plan.deep_rows)) for plan in plans]

    def fitted(self) -> list[Candidate]:
        """Return fits at each boundary, or at a few that are deeper than unfitted candidates."""
        plans = self.plans
        if any(self.rungs):
            shallowest = min((each.boundary for each in self.inside), default=plans[0].boundary + 1)
            plans = [
                plan
                for plan in plans
                if plan.boundary < shallowest and plan.projection != Projection.OWN
            ]
        few = self._spaced(plans)
        return [Candidate(self._with_rows(plan, plan.deep_rows)) for plan in few]

    def distilled(self) -> list[Candidate]:
        """Return distilled fits from the fastest candidate down, or all if none is inside."""
        if self.fitter.distiller is None:
            return []
        first = (self.fastest() if self.inside else self.judged[0]).boundary
        plain = [it for rung in self.rungs for it in rung if it.fitted and it.boundary <= first]
        return [Candidate(replace(it.plan, is_distilled=True), start=it.fitted) for it in plain]

    def fewer_rows(self) -> list[Candidate]:
        """Return candidates with fewer deep rows, by rule, then by boundary.

        The boundaries start at the deepest within the budget. Each uses its last fit.
        """
        if not self.inside:
            return []
        deepest = min(each.boundary for each in self.inside)
        ready = {it.boundary: it for rung in self.rungs for it in rung if it.is_ready}
        found = [ready[boundary] for boundary in sorted(ready) if boundary >= deepest]
        return [
            Candidate(self._with_rows(it.plan, rule), it.fitted)
            for rule in self.plans[0].deep_rows.fewer
            for it in found
        ]

    def _spaced(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return spaced(plans, self.runner.source, self.fitter.options)

    # Fits

    def fit(self, wanted: Sequence[Candidate]) -> None:
        """Fit the first candidate, and later candidates in the same pass (rule 4)."""
        options = self.fitter.options
        options = options if len(self.plans) == 1 else options.at(wanted[0].boundary)
        fitted = self._kept(wanted, options.state_path) or self._room_for(wanted)
        plans = [each.plan for each in fitted]
        self.runner.require_room(plans, options.kv_type)
        names = ", ".join(map(str, sorted(plan.boundary for plan in plans)))
        self._note(f"Fitting the projections for boundary {names}")
        made = self.fitter.fit(plans, options.state_path)
        for candidate, fit in zip(fitted, made, strict=True):
            candidate.fitted = fit
            candidate.plan = replace(candidate.plan, projection=fit.projection)

    def _kept(self, wanted: Sequence[Candidate], state_path: Path | None) -> list[Candidate]:
        """Return the candidates of a stored fit, which continues regardless of the free memory."""
        kept = kept_boundaries(state_path) if state_path else ()
        known = {each.boundary: each for each in wanted}
        is_ours = wanted[0].boundary in kept and known.keys() >= set(kept)
        return [known[each] for each in kept] if is_ours else []

    def _room_for(self, wanted: Sequence[Candidate]) -> list[Candidate]:
        """Return the first candidate, and further candidates whose sums also fit into memory."""
        chosen: list[Candidate] = []
        for candidate in (each for each in wanted if not each.is_ready):
            plans = [each.plan for each in (*chosen, candidate)]
            needs = fit_needs(plans, self.runner.source, self.fitter.options)
            if chosen and len(needs.groups) > 1:
                break
            chosen.append(candidate)
        return chosen

    def distil(self, wanted: Sequence[Candidate]) -> None:
        """Train the first candidate's fit end to end."""
        candidate, n_deeper = wanted[0], min(N_DEEPER, len(wanted) - 1)
        assert candidate.start is not None
        candidate.fitted = self.fitter.distilled(candidate.plan, candidate.start, n_deeper)


STAGES = (
    SearchStage(Search.own, Search.bisect, prepare=Search.fit),
    SearchStage(Search.fitted, Search.bisect, prepare=Search.fit),
    SearchStage(Search.distilled, Search.walk, prepare=Search.distil),
    SearchStage(Search.fewer_rows, Search.trade, prepare=Search.fit),
)
