"""The fastest recipe within a budget: fits and measures candidates until it is known.

That is the deepest boundary inside, unless deeper ones are with attention kept, or a selection, or
once they are distilled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile

from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Budget, Measured
from pop_converter.popfile.plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.base.errors import PopError
from pop_local.calibration.needs import KINDS_OF_MANY, fit_needs
from pop_local.calibration.options import FitOptions
from pop_local.calibration.state import kept_boundaries
from pop_local.engine.model import PopModel
from pop_local.measure import budget as budgets
from pop_local.measure.forced import Pruning
from pop_local.measure.gradual import Gradual
from pop_local.measure.quality import Quality, QualitySettings
from pop_local.measure.recall import NO_ANSWERS, Recall
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.fits import Distiller, Fitter, require_room, temporary_sidecar
from pop_local.workflows.full_model import FullModel
from pop_local.workflows.measuring import measured, opened_to_measure, recalled
from pop_local.workflows.options import Hardware
from pop_local.workflows.refusals import OverBudgetError, Trial

# Their mean KL has a standard error of a fifth or less.
N_WINDOWS = 16
N_DOCUMENTS = 12
# So many boundaries past the deepest inside are tried with attention, which mends copying, and what
# that must win.
N_PAST = 2
ATTENTION_GAIN = 1.03
# Text is read in full to distil one boundary, and so many past it.
N_DEEPER = 3
# Of the context tokens, what deeper boundaries are tried with, and what that must win over the
# fastest without: a selection takes some time that its limit does not count, and keeps states.
SELECTED = 0.1
SELECTION_GAIN = 1.1


@dataclass(frozen=True)
class Chosen:
    """What is to be written: a plan, its fit (None for own projections), and its quality.

    `trials`: what was measured, from the shallowest boundary on, then with attention, with a
    selection and distilled.
    """

    plan: Plan
    fitted: Fitted | None
    measured: Measured
    trials: tuple[Trial, ...]


def search(
    source: Source,
    plans: Sequence[Plan],
    budget: Budget,
    options: FitOptions,
    hardware: Hardware,
    watch: Watch,
    kinds: Sequence[Projection] = KINDS_OF_MANY,
    distiller: Distiller | None = None,
) -> Chosen:
    """Choose the deepest of a model's plans within the budget; those to be fitted, by `options`.

    `kinds` of fit are tried where the options leave it open.

    Raises OverBudgetError, PopError, StoppedError.
    """
    settings = QualitySettings(N_WINDOWS)
    full = FullModel(source.first.path, plans[0], settings, hardware, watch)
    fitter = Fitter(source, options, hardware, watch, kinds, full=full, distiller=distiller)
    by_boundary = {plan.boundary: plan for plan in plans}
    return _Search(source, by_boundary, budget, options, hardware, watch, full, fitter).run()


@dataclass
class _Search:
    """One search; keeps what was fitted and measured."""

    source: Source
    plans: dict[int, Plan]
    budget: Budget
    options: FitOptions
    hardware: Hardware
    watch: Watch
    full: FullModel
    fitter: Fitter
    # By boundary, kind, and whether it is distilled.
    fitted: dict[tuple[int, Projection, bool], Fitted] = field(default_factory=dict)
    measured: dict[int, Gradual] = field(default_factory=dict)
    qualities: dict[int, Quality] = field(default_factory=dict)
    verdicts: dict[int, bool] = field(default_factory=dict)
    recalls: dict[int, Recall] = field(default_factory=dict)

    def run(self) -> Chosen:
        deepest = self._deepest_inside()
        trials = self._trials()
        if deepest is not None:
            trials += self._tried(self._with_attention(deepest, _limit(trials)), until=True)
            trials += self._tried(self._with_selection(deepest, _limit(trials)), until=False)
        if self.fitter.distiller is not None:
            trials += self._distilled(trials)
        if not any(trial.in_budget for trial in trials):
            raise self._over(trials)
        chosen = _fastest(trials)
        figures = budgets.figures_in_words(chosen.quality)
        self.watch.on_note(
            f"Boundary {_named(chosen.plan)} is the fastest within the budget: {figures}"
        )
        verdict = {True: "inside", False: "outside"}
        tried = ", ".join(f"{_named(each.plan)} {verdict[each.in_budget]}" for each in trials)
        plan = replace(chosen.plan, budget=replace(self.budget, tried=tried))
        if chosen.recall is not None:
            plan = replace(plan, recall=recalled(chosen.recall))
        return Chosen(plan, self._fit_of(plan), measured(chosen.quality), trials)

    def _past(self, deepest: int) -> list[int]:
        return sorted((each for each in self.plans if each < deepest), reverse=True)

    def _with_attention(self, deepest: int, limit: float) -> list[Plan]:
        """Fit the next deeper boundaries with attention, if the first lost copying or facts alone.

        The deepest comes first; all win enough over `limit`.
        What goes wrong with these fits leaves what was found without them.
        """
        past = self._past(deepest)[:N_PAST]
        if not past or self.options.projection:
            return []
        if self.plans[past[0]].projection in (Projection.OWN, Projection.ATTENTION):
            return []
        if not budgets.predicts(self.budget, self.qualities[past[0]]):
            return []
        plans = [
            replace(self.plans[each], projection=Projection.ATTENTION) for each in reversed(past)
        ]
        plans = [plan for plan in plans if plan.speedup_limit >= ATTENTION_GAIN * limit]
        if not plans:
            return []
        names = ", ".join(str(plan.boundary) for plan in plans)
        self.watch.on_note(f"Fitting boundary {names} with attention, since copying was lost first")
        options = replace(self.options, projection=Projection.ATTENTION)
        fitter = replace(self.fitter, options=options)
        try:
            require_room(plans, self.source, options)
            made = fitter.fit(plans, options.at(past[0]).state_path)
        except PopError as error:
            self.watch.on_note(f"Attention is left out: {error}")
            return []
        self._keep(plans, made)
        return plans

    def _with_selection(self, deepest: int, limit: float) -> list[Plan]:
        """Return deeper boundaries that are a tenth faster than `limit` with a selection.

        None goes as deep as where copying was lost, which a selection hardly mends.
        """
        if self.plans[deepest].shape.no_refill:
            return []
        past = [self.plans[each] for each in takewhile(self._may_copy, self._past(deepest))]
        plans = [replace(plan, select=SELECTED) for plan in past if self._is_ready(plan)]
        return [plan for plan in plans if plan.speedup_limit >= SELECTION_GAIN * limit]

    def _distilled(self, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """Try distilled fits: the fastest without a selection, then deeper ones while they pass.

        Where no fit passes, the shallowest is the first. One that loses a few facts too many, which
        another fit may find, does not end it, a second does. The deeper ones are of the fastest's
        kind where there is such a fit. What goes wrong leaves what was found without distilling.
        """
        passing = [trial for trial in trials if trial.in_budget and not trial.plan.select]
        chosen = _fastest(passing).plan if passing else self.plans[max(self.verdicts)]
        plans = [chosen]
        for boundary in self._past(chosen.boundary):
            plan = self.plans[boundary]
            is_there = (boundary, chosen.projection, False) in self.fitted
            plans.append(replace(plan, projection=chosen.projection) if is_there else plan)
        found: tuple[Trial, ...] = ()
        has_lost_few = False
        for plan in plans:
            if plan.projection == Projection.OWN or not self._is_ready(plan):
                continue
            try:
                tried = self._tried([replace(plan, is_distilled=True)], until=False)
            except PopError as error:
                self.watch.on_note(f"Distilling is left out: {error}")
                break
            found += tried
            [trial] = tried
            if trial.in_budget:
                continue
            # Facts are asked for where everything else is inside.
            is_near = trial.recall is not None and budgets.is_open(self.budget, trial.recall)
            if has_lost_few or not is_near:
                break
            has_lost_few = True
        return found

    def _may_copy(self, boundary: int) -> bool:
        found = self.qualities.get(boundary)
        return found is None or budgets.copies(self.budget, found)

    def _tried(self, plans: Sequence[Plan], until: bool) -> tuple[Trial, ...]:
        """Try plans, up to the first that is inside (`until` true) or outside."""
        trials: list[Trial] = []
        for plan in plans:
            gradual = Gradual(self.full.reference, plan.boundary, plan.select)
            quality = self._measure(plan, gradual, self._is_outside)
            inside, recall = budgets.is_inside(self.budget, quality), None
            if inside:
                recall = self._ask(plan)
                inside = budgets.recalls(self.budget, recall)
            trials.append(Trial(plan, quality, inside, recall))
            if inside is until:
                break
        return tuple(trials)

    def _is_outside(self, quality: Quality) -> bool:
        return budgets.is_clear(self.budget, quality) and not budgets.is_inside(
            self.budget, quality
        )

    def _deepest_inside(self) -> int | None:
        while True:
            if wanted := budgets.undecided(self.plans, self.verdicts):
                boundary = wanted[0]
                if not self._is_ready(self.plans[boundary]):
                    self._fit(wanted)
                self._judge(boundary, lambda quality: budgets.is_clear(self.budget, quality))
                continue
            deepest = budgets.deepest_inside(self.verdicts)
            if deepest is None or deepest in self.recalls:
                return deepest
            # On all windows, and asked for facts, it may be outside after all.
            if not self.measured[deepest].is_whole:
                self._judge(deepest, lambda quality: False)
                continue
            recall = self.recalls[deepest] = self._ask(self.plans[deepest])
            self.verdicts[deepest] = budgets.recalls(self.budget, recall)

    def _trials(self) -> tuple[Trial, ...]:
        return tuple(
            Trial(
                self.plans[boundary],
                self.qualities[boundary],
                passed,
                self.recalls.get(boundary),
            )
            for boundary, passed in sorted(self.verdicts.items(), reverse=True)
        )

    def _over(self, trials: tuple[Trial, ...]) -> OverBudgetError:
        shallowest = max(trial.plan.boundary for trial in trials)
        best = [trial for trial in trials if trial.plan.boundary == shallowest][-1]
        n_skipped, limits = best.plan.n_skipped, budgets.limits_in_words(self.budget)
        return OverBudgetError(
            f"{n_skipped} skipped layer{'s' * (n_skipped > 1)} lose{'s' * (n_skipped == 1)} more"
            f" than the budget allows ({limits}):"
            f" {budgets.figures_in_words(best.quality, best.recall)}",
            trials,
        )

    def _fit(self, wanted: Sequence[int]) -> None:
        """Fit the first of `wanted`, with others in the same pass over the text."""
        options = self.options if len(self.plans) == 1 else self.options.at(wanted[0])
        # A fit that is there goes on, whatever memory is free now.
        kept = kept_boundaries(options.state_path) if options.state_path else ()
        is_ours = wanted[0] in kept and {*kept} <= {*self.plans}
        boundaries = kept if is_ours else self._room_for(wanted)
        plans = [self.plans[boundary] for boundary in boundaries]
        require_room(plans, self.source, options)
        names = ", ".join(str(plan.boundary) for plan in sorted(plans, key=lambda p: p.boundary))
        self.watch.on_note(f"Fitting the projections for boundary {names}")
        made = self.fitter.fit(plans, options.state_path)
        self._keep(plans, made)
        for plan, fitted in zip(plans, made, strict=True):
            self.plans[plan.boundary] = replace(plan, projection=fitted.projection)
            if seen := self.fitter.seen.get((plan.boundary, fitted.projection)):
                self.measured[plan.boundary] = seen

    def _keep(self, plans: Sequence[Plan], made: Sequence[Fitted]) -> None:
        for plan, fitted in zip(plans, made, strict=True):
            self.fitted[plan.boundary, fitted.projection, False] = fitted

    def _fit_of(self, plan: Plan) -> Fitted | None:
        if plan.projection == Projection.OWN:
            return None
        plain = self.fitted[plan.boundary, plan.projection, False]
        if not plan.is_distilled:
            return plain
        key = plan.boundary, plan.projection, True
        if key not in self.fitted:
            n_deeper = min(N_DEEPER, len(self._past(plan.boundary)))
            self.fitted[key] = self.fitter.distilled(plan, plain, n_deeper)
        return self.fitted[key]

    def _is_ready(self, plan: Plan) -> bool:
        return (
            plan.projection == Projection.OWN
            or (plan.boundary, plan.projection, False) in self.fitted
        )

    def _room_for(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """The first of `wanted`, and as many of the others as fit into memory beside it."""
        chosen: list[int] = []
        for boundary in wanted:
            if self._is_ready(self.plans[boundary]):
                continue
            plans = [self.plans[each] for each in (*chosen, boundary)]
            if chosen and len(fit_needs(plans, self.source, self.options).groups) > 1:
                break
            chosen.append(boundary)
        return tuple(chosen)

    def _judge(self, boundary: int, is_enough: Callable[[Quality], bool]) -> None:
        """Measure a boundary until that is enough, and judge it."""
        gradual = self.measured.setdefault(boundary, Gradual(self.full.reference, boundary))
        quality = self._measure(self.plans[boundary], gradual, is_enough)
        self.qualities[boundary] = quality
        self.verdicts[boundary] = budgets.is_inside(self.budget, quality)

    def _measure(
        self, plan: Plan, gradual: Gradual, is_enough: Callable[[Quality], bool]
    ) -> Quality:
        if known := gradual.settled(is_enough):
            return known
        self._fit_of(plan)
        self.watch.on_note(f"Measuring boundary {_named(plan)} on held-out text")
        begin = partial(self.watch.stage, f"Measuring boundary {plan.boundary}")
        with self._opened(plan) as model:
            return gradual.measure_until(is_enough, model, begin)

    def _ask(self, plan: Plan) -> Recall:
        """Ask for facts of pruned documents, of as many more where a few are lost."""
        pruning, answers = Pruning(plan.boundary, select=plan.select), NO_ANSWERS
        for n_documents in (N_DOCUMENTS, 2 * N_DOCUMENTS):
            reference = self.full.recall(n_documents)
            with self._opened(plan) as model:
                advance = self.watch.stage(f"Asking for facts, boundary {_named(plan)}")
                answers = reference.answers(model, pruning, advance, answers)
            recall = reference.compared(answers)
            if not budgets.is_open(self.budget, recall):
                break
        return recall

    @contextmanager
    def _opened(self, plan: Plan) -> Iterator[PopModel]:
        fitted = self._fit_of(plan)
        sidecar = temporary_sidecar(plan, self.source, fitted) if fitted else nullcontext()
        with sidecar as written:
            files = ModelFiles(self.source.first.path, written)
            with opened_to_measure(files, plan, self.hardware, self.watch) as (model, _):
                yield model


def _fastest(trials: Sequence[Trial]) -> Trial:
    inside = (trial for trial in trials if trial.in_budget)
    return max(inside, key=lambda trial: (trial.plan.speedup_limit, -trial.quality.kl_mean.value))


def _limit(trials: Sequence[Trial]) -> float:
    return _fastest(trials).plan.speedup_limit


def _named(plan: Plan) -> str:
    attention = " with attention" if plan.projection == Projection.ATTENTION else ""
    selected = f" with {plan.select:.0%} selected" if plan.select else ""
    return f"{plan.boundary}{attention}{selected}{' distilled' if plan.is_distilled else ''}"
