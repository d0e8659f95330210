"""The deepest boundary within a budget: fits and measures candidates until it is known."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from converter.format import FITTED, Budget
from converter.plan import Plan
from converter.rewrite import Fitted
from converter.source import Source
from pop_local.calibration.needs import fit_needs
from pop_local.calibration.options import FitOptions
from pop_local.calibration.state import kept_boundaries
from pop_local.measure import quality as measuring
from pop_local.measure.bracket import find_bracket
from pop_local.measure.budget import (
    Bracket,
    deepest_inside,
    figures_in_words,
    is_clearly_outside,
    is_inside,
    limits_in_words,
    next_boundary,
    worth_fitting,
)
from pop_local.measure.heldout import room
from pop_local.measure.quality import Quality, QualitySettings
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.fits import Fitter
from pop_local.workflows.measuring import measured, opened_to_measure
from pop_local.workflows.options import Hardware
from pop_local.workflows.refusals import OverBudgetError
from pop_local.workflows.results import Chosen, Trial
from pop_local.workflows.sidecars import require_room, temporary_sidecar

# What clearly fails shows on few windows; 24 have a standard error of a sixth of the KL or less.
N_FIRST_WINDOWS = 8
N_WINDOWS = 24


@dataclass(frozen=True)
class Candidates:
    """The plans of one model to choose among, from the shallowest on, and how to fit them."""

    source: Source
    plans: tuple[Plan, ...]
    options: FitOptions
    hardware: Hardware


def search(candidates: Candidates, budget: Budget, watch: Watch) -> Chosen:
    """Choose the deepest plan within the budget. Raises OverBudgetError, PopError, StoppedError."""
    return _Search(candidates, budget, watch).run()


class _Search:
    """One search; keeps what was fitted and measured."""

    def __init__(self, candidates: Candidates, budget: Budget, watch: Watch) -> None:
        self._source, self._options = candidates.source, candidates.options
        self._hardware, self._watch = candidates.hardware, watch
        self._plans = {plan.boundary: plan for plan in candidates.plans}
        self._budget = budget
        self._fitter = Fitter(candidates.source, candidates.options, candidates.hardware, watch)
        self._fitted: dict[int, Fitted] = {}
        self._qualities: dict[int, Quality] = {}
        self._verdicts: dict[int, bool] = {}

    def run(self) -> Chosen:
        bracket, verdicts = self._bracket(), self._verdicts
        while (boundary := next_boundary(bracket, verdicts)) is not None:
            if self._plans[boundary].projection == FITTED and boundary not in self._fitted:
                self._fit(worth_fitting(bracket, verdicts, boundary))
            quality = self._qualities[boundary] = self._measured(boundary)
            verdicts[boundary] = is_inside(self._budget, quality)
        chosen = deepest_inside(verdicts)
        if chosen is None:
            raise self._over()
        plan = replace(self._plans[chosen], budget=replace(self._budget, tried=self._tried()))
        found = measured(self._qualities[chosen])
        return Chosen(plan, self._fitted.get(chosen), found, self._trials())

    def _shallowest_first(self) -> Iterable[tuple[int, bool]]:
        return sorted(self._verdicts.items(), reverse=True)

    def _trials(self) -> tuple[Trial, ...]:
        return tuple(
            _trial(self._plans[boundary], self._qualities[boundary], passed)
            for boundary, passed in self._shallowest_first()
        )

    def _tried(self) -> str:
        verdicts = self._shallowest_first()
        return ", ".join(f"{each} {'inside' if passed else 'outside'}" for each, passed in verdicts)

    def _over(self) -> OverBudgetError:
        best = max(self._verdicts)
        n_skipped = self._plans[best].n_skipped
        return OverBudgetError(
            f"not even {n_skipped} skipped layer{'s' * (n_skipped > 1)} is within the budget "
            f"({limits_in_words(self._budget)}): {figures_in_words(self._qualities[best])}",
            self._trials(),
        )

    def _bracket(self) -> Bracket:
        self._watch.on_note("Looking how deep the layers' own projections go")
        deepest = self._plans[min(self._plans)]
        files = ModelFiles(self._source.first.path)
        with opened_to_measure(files, deepest, self._hardware, self._watch) as (model, tokens):
            advance = self._watch.stage("Trying boundaries")
            return find_bracket(model, deepest, self._budget, tokens, advance)

    def _fit(self, wanted: Sequence[int]) -> None:
        """Fit the first of `wanted`, with others in the same pass over the text."""
        options = self._options.at(wanted[0])
        boundaries = self._kept(options) or self._room_for(wanted)
        plans = [self._plans[boundary] for boundary in boundaries]
        require_room(plans, self._source, options)
        names = ", ".join(str(plan.boundary) for plan in sorted(plans, key=lambda p: p.boundary))
        self._watch.on_note(f"Fitting the projections for boundary {names}")
        for plan, fitted in zip(plans, self._fitter.fit(plans, options.state_path), strict=True):
            self._fitted[plan.boundary] = fitted

    def _kept(self, options: FitOptions) -> tuple[int, ...]:
        """The boundaries of a fit to go on with, whatever memory is free now."""
        found = kept_boundaries(options.state_path) if options.state_path else ()
        return found if set(found) <= set(self._plans) else ()

    def _room_for(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """The first of `wanted`, and as many of the others as fit into memory beside it."""
        chosen: list[int] = []
        for boundary in wanted:
            if self._plans[boundary].projection != FITTED or boundary in self._fitted:
                continue
            plans = [self._plans[each] for each in (*chosen, boundary)]
            if chosen and len(fit_needs(plans, self._source, self._options).groups) > 1:
                break
            chosen.append(boundary)
        return tuple(chosen)

    def _measured(self, boundary: int) -> Quality:
        self._watch.on_note(f"Measuring boundary {boundary} on held-out text")
        plan = self._plans[boundary]
        with ExitStack() as stack:
            sidecar = None
            if plan.projection == FITTED:
                written = temporary_sidecar(plan, self._source, self._fitted[boundary])
                sidecar = stack.enter_context(written)
            files = ModelFiles(self._source.first.path, sidecar)
            model, tokens = stack.enter_context(
                opened_to_measure(files, plan, self._hardware, self._watch)
            )
            settings = QualitySettings()
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            return measuring.measure_unless(
                model,
                tokens,
                replace(settings, n_windows=min(N_WINDOWS, max(1, n_found))),
                boundary,
                N_FIRST_WINDOWS,
                lambda quality: is_clearly_outside(self._budget, quality),
                self._watch.stage(f"Measuring boundary {boundary}"),
            )


def _trial(plan: Plan, quality: Quality, in_budget: bool) -> Trial:
    retention = quality.induction_retention
    return Trial(
        boundary=plan.boundary,
        n_skipped=plan.n_skipped,
        speedup_limit=plan.speedup_limit,
        n_windows=quality.n_windows,
        kl_mean=quality.kl_mean.value,
        kl_se=quality.kl_mean.se or 0.0,
        copy_ppl_ratio=quality.copy_ppl_ratio.value,
        copy_ppl_ratio_se=quality.copy_ppl_ratio.se or 0.0,
        induction_retention=None if retention is None else retention.value,
        induction_retention_se=None if retention is None else retention.se or 0.0,
        in_budget=in_budget,
    )
