"""Fits of one model on text that is sampled once, and their distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from pop_converter.gguf.source import Source
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import Callbacks, calibrate
from pop_local.calibration.needs import fit_cost, in_kinds
from pop_local.calibration.texts import CalibrationText
from pop_local.measure import budget as budgets
from pop_local.measure.gradual import Gradual
from pop_local.measure.quality import Quality, QualitySettings
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.events import Progress, Watch
from pop_local.workflows.hardware import Hardware

# A wider fit must reduce the KL by this many times its share of the speed. That is the rate of one
# skipped layer less, which costs about 4 % of the speed and reduces the KL by a fifth.
_WORTH = 5.0
_N_WINDOWS = 8


class Distilling(Protocol):
    """Distiller of one model's fits (pop_local.research.distilled)."""

    def require(self, plan: Plan) -> object:
        """Raise PopError if the plan's fit cannot be distilled."""

    def train(self, plan: Plan, fitted: Fitted, text: CalibrationText, n_deeper: int) -> Fitted:
        """Return the fit, trained on `text`. Raises PopError, StoppedError.

        `n_deeper`: number of deeper boundaries that will probably follow.
        """


MakeDistiller = Callable[[Source, FitOptions, Hardware, Watch], Distilling]


@dataclass
class PlanFitter:
    """Fitter of a model's plans, with the same options and text for all plans.

    If the options have no kind of fit, the kind is chosen by measuring the first boundary; kinds
    that copy take precedence. `full` is the reference (None: a few windows are read). `seen`: these
    measurements by boundary and kind.
    """

    runner: TrialRunner
    options: FitOptions
    full: FullModel | None = None
    text: CalibrationText | None = None
    kind: Projection | None = None
    seen: dict[tuple[int, Projection], Gradual] = field(default_factory=dict)
    distiller: Distilling | None = None

    def fit(self, plans: Sequence[Plan], state_path: Path | None) -> tuple[Fitted, ...]:
        """Fit all plans in one pass, resuming from `state_path`. Raises PopError, StoppedError."""
        if not plans:
            return ()
        follow = Callbacks(
            self._lazily("Sampling text"), self._lazily("Fitting"), self.runner.watch.should_stop
        )
        kind = self.options.projection or self.kind
        options = replace(self.options, state_path=state_path, projection=kind)
        wanted = in_kinds(plans, options)
        with loaded(self.runner.path, **vars(self.runner.hardware)) as context:
            done = calibrate(wanted, context, self.runner.source, options, follow, self.text)
        self.text = done.text
        made: dict[int, dict[Projection, Fitted]] = {plan.boundary: {} for plan in plans}
        for plan, fitted in zip(wanted, done.fitted, strict=True):
            made[plan.boundary][plan.projection] = fitted
        return tuple(self._better(plan, made[plan.boundary]) for plan in plans)

    def distilled(self, plan: Plan, fitted: Fitted, n_deeper: int = 0) -> Fitted:
        """Train a fit end to end. Raises PopError, StoppedError."""
        assert self.distiller is not None and self.text is not None, "nothing was fitted"
        return self.distiller.train(plan, fitted, self.text, n_deeper)

    def _better(self, plan: Plan, fits: Mapping[Projection, Fitted]) -> Fitted:
        """Return the fit of the better kind, which is measured at the first boundary."""
        if len(fits) == 1:
            [self.kind] = fits
        if self.kind is None:
            self.runner.watch.on_note("Measuring whether a wider fit is worth its cost")
            found = self._qualities(plan, fits)
            costs = {kind: fit_cost(plan, kind) for kind in fits}
            losses = {kind: each.kl_mean.value for kind, each in found.items()}
            able = [kind for kind, each in found.items() if budgets.copies(each)] or list(fits)
            self.kind = min(able, key=lambda kind: losses[kind] / (1 - _WORTH * costs[kind]))
            seen = ", ".join(
                f"{kind} KL {losses[kind]:.4f} for {costs[kind]:.1%} of the speed"
                + ("" if kind in able else ", copying broken")
                for kind in fits
            )
            self.runner.watch.on_note(f"Projections are {self.kind}: {seen}")
        return fits[self.kind]

    def _qualities(
        self, plan: Plan, fits: Mapping[Projection, Fitted]
    ) -> dict[Projection, Quality]:
        full = self.full or FullModel(self.runner, plan, QualitySettings(_N_WINDOWS, n_draws=1))
        begin = partial(self.runner.watch.stage, "Measuring")
        qualities = {}
        for kind, fitted in fits.items():
            gradual = self.seen[plan.boundary, kind] = Gradual(full.reference, plan.boundary)
            with self.runner.tried(plan, fitted) as model:
                qualities[kind] = gradual.measure_until(
                    lambda found: found.n_windows >= _N_WINDOWS, model, begin
                )
        return qualities

    def _lazily(self, name: str) -> Progress:
        """Return the progress callback of a stage that starts with its first work."""
        watch, begun = self.runner.watch, False

        def advance(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                watch.stage(name)
                begun = True
            watch.on_progress(done, total)

        return advance
