"""Fit and distill all of a model's plans on the same sampled text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pop_base.progress import Watch
from pop_converter.gguf.source import Source
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import calibrate, calibration_text
from pop_local.calibration.needs import fit_kind
from pop_local.calibration.texts import CalibrationText
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.hardware import Hardware


class Distilling(Protocol):
    """Protocol for classes that distill one model's fits (see pop_local.research.distilled)."""

    def require(self, plan: Plan) -> object:
        """Raise PopError if the plan's fit cannot be distilled."""

    def train(self, plan: Plan, fitted: Fitted, text: CalibrationText) -> Fitted:
        """Train the fit on `text` and return the trained fit. Raises PopError or StoppedError."""


MakeDistiller = Callable[[Source, FitOptions, Hardware, Watch], Distilling]


@dataclass
class PlanFitter:
    """A fitter that uses the same text and the same kind of fit for all of a model's plans.

    If the options specify no kind of fit, the first fitted plan's kind is used for all plans.
    """

    runner: TrialRunner
    options: FitOptions
    distiller: Distilling | None = None
    text: CalibrationText | None = None
    kind: Projection | None = None

    def fit(self, plans: Sequence[Plan]) -> tuple[Fitted, ...]:
        """Fit all plans on the same text. Raises PopError or StoppedError."""
        if not plans:
            return ()
        self.kind = self.kind or fit_kind(plans[0], self.options)
        options = replace(self.options, projection=self.kind)
        plans = [replace(plan, projection=self.kind) for plan in plans]
        watch, n_embd = self.runner.watch, plans[0].shape.n_embd
        with loaded(self.runner.path, **vars(self.runner.hardware)) as context:
            if self.text is None:
                self.text = calibration_text(context, options, n_embd, watch)
            return calibrate(plans, context, self.runner.source, options, watch, self.text)

    def distill(self, plan: Plan, fitted: Fitted) -> Fitted:
        """Train a plan's fit end to end and return the result. Raises PopError or StoppedError."""
        assert self.distiller is not None and self.text is not None, "nothing was fitted"
        return self.distiller.train(plan, fitted, self.text)
