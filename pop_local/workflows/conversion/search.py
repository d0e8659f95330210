"""Search for the fastest candidate within a budget, stage by stage.

A candidate is a boundary, a fit and a rule for deep rows. STAGES defines the order of the stages,
each stage's candidates, and their order. The search follows these rules:

1. Each candidate is measured with the sidecar that would be written, on held-out text first and on
look-ups last. 2. Clear verdicts need few windows, but the chosen candidate is measured on all
windows. 3. Bisection assumes that skipping more layers never improves quality. It starts at the
middle boundary (`budget.undecided`). 4. One pass fits a boundary and the boundaries that bisection
may need next, if memory allows. 5. If the sums of all fits would exceed MOST_SUMS_BYTES, the search
tries the layers' own projections first. It continues with one pass that fits a few evenly spaced,
deeper boundaries. 6. A walk starts at the fastest candidate found by the earlier stages. Each step
tries the next deeper boundary, until a candidate exceeds the budget. If a step fails (for example
for lack of memory), the earlier results remain valid. 7. Deep rows restore look-ups and cost time.
The last stage tries each rule with fewer deep rows at the deepest boundary within the budget, then
at shallower boundaries. This stage stops at the first candidate within the budget, or if no
remaining candidate would be the fastest. The search assumes that fewer deep rows never improve
quality at the same boundary. 8. The search chooses the fastest candidate within the budget. Among
equally fast candidates, it prefers a distilled candidate, unless its KL is larger by more than the
standard error. Otherwise, it chooses the smallest KL.
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

# Maximum number of deeper boundaries that share the text read for distilling at one boundary.
N_DEEPER = 3


@dataclass(frozen=True)
class SearchStage:
    """One stage of the search.

    `candidates` returns the candidates to try, in order of increasing depth. `order` tries the
    candidates. `prepare` fits the first candidate, and further candidates if one pass saves work.
    """

    candidates: Callable[[Search], Iterable[Candidate]]
    order: Callable[[Search, SearchStage, Sequence[Candidate]], None]
    prepare: Callable[[Search, Sequence[Candidate]], None]


def write_within(run: ConversionRun, budget: Budget) -> Outcome:
    """Write the conversion's fastest plan that is within the budget.

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
    """A search among plans, which are in order of increasing depth.

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
        """Return the fastest candidate within the budget, whose plan lists all tried candidates.

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
            f"skipping {n_skipped} layer{'s' * (n_skipped > 1)} loses more"
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
            # Measuring all windows and look-ups may reverse the deepest candidate's verdict.
            if deepest is None or self.judge.settle(by_boundary[deepest]):
                return

    def walk(self, stage: SearchStage, rung: Sequence[Candidate]) -> None:
        """Try the candidates in order until one of them exceeds the budget (rule 6)."""
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
        """Return a large model's unfitted candidates, if the options allow them."""
        fitted = [plan for plan in self.plans if plan.projection != Projection.OWN]
        if self.fitter.options.projection is not None or len(self._spaced(fitted)) == len(fitted):
            return []
        self._note(
            "Measuring the layers' own projections first, since memory is too small for fitting all"
            " boundaries at once"
        )
        plans = [replace(plan, projection=Projection.OWN) for plan in self.plans]
        return [Candidate(self._with_rows(plan, plan.deep_rows)) for plan in plans]

    def fitted(self) -> list[Candidate]:
        """Return candidates to fit, at all boundaries or at a few deeper boundaries."""
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
        """Return candidates to distil, starting at the fastest candidate's boundary.

        If no candidate is within the budget, the result starts at the first measured boundary.
        """
        if self.fitter.distiller is None:
            return []
        first = (self.fastest() if self.inside else self.judged[0]).boundary
        plain = [it for rung in self.rungs for it in rung if it.fitted and it.boundary <= first]
        return [Candidate(replace(it.plan, is_distilled=True), start=it.fitted) for it in plain]

    def fewer_rows(self) -> list[Candidate]:
        """Return candidates with fewer deep rows, ordered by rule and then by boundary.

        The first boundary is the deepest boundary within the budget. Each candidate reuses the last
        fit at its boundary.
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
        """Fit the first candidate, and the next candidates if the same pass has room (rule 4)."""
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
        """Return a stored fit's candidates; the fit continues regardless of the free memory."""
        kept = kept_boundaries(state_path) if state_path else ()
        known = {each.boundary: each for each in wanted}
        is_ours = wanted[0].boundary in kept and known.keys() >= set(kept)
        return [known[each] for each in kept] if is_ours else []

    def _room_for(self, wanted: Sequence[Candidate]) -> list[Candidate]:
        """Return the first candidate, and the next candidates whose sums also fit into memory."""
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
