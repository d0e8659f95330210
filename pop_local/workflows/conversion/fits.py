"""Fit and distill all of a model's plans on the same sampled text."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pop_base.errors import FormatError, PopError
from pop_base.progress import Watch
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import fitted_tensors, read_sidecar, write_trial
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import calibrate, calibration_text
from pop_local.calibration.needs import fit_kind
from pop_local.calibration.texts import DEFAULT_NAME, CalibrationText
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

    If the options specify no kind of fit, the first fitted plan's kind is used for all plans. If a
    conversion is stopped, `folder` keeps the fits (as sidecars) and the sampled text. The text's
    file name contains the model's hash. If `folder` is None, nothing is kept.
    """

    runner: TrialRunner
    options: FitOptions
    distiller: Distilling | None = None
    folder: Path | None = None
    text: CalibrationText | None = None
    kind: Projection | None = None
    _fits: dict[Plan, Fitted] = field(default_factory=dict)

    def fit(self, plans: Sequence[Plan]) -> tuple[Fitted, ...]:
        """Fit all plans on the same text. Raises PopError or StoppedError."""
        if not plans:
            return ()
        self.kind = self.kind or fit_kind(plans[0], self.options)
        options = replace(self.options, projection=self.kind)
        plans = [replace(plan, projection=self.kind) for plan in plans]
        watch, n_embd = self.runner.watch, plans[0].shape.n_embd
        if self.text is None:
            self.text = self._kept_text(options.n_tokens(n_embd))
        with loaded(self.runner.path, **vars(self.runner.hardware)) as context:
            if self.text is None:
                self.text = calibration_text(context, options, n_embd, watch)
            if kept := self._kept_fits(plans, self.text):
                watch.on_note(f"Reusing {len(kept)} fits from {self.folder}.")
                self._fits |= kept
            if missing := [plan for plan in plans if plan not in self._fits]:
                fits = calibrate(missing, context, self.runner.source, options, watch, self.text)
                self._fits |= zip(missing, fits, strict=True)
        return tuple(self._fits[plan] for plan in plans)

    def distill(self, plan: Plan, fitted: Fitted) -> Fitted:
        """Train a plan's fit end to end and return the result. Raises PopError or StoppedError."""
        assert self.distiller is not None and self.text is not None, "nothing was fitted"
        return self.distiller.train(plan, fitted, self.text)

    def keep(self) -> None:
        """Save the sampled text and the fits from a stopped conversion, and notify the user."""
        is_sampled = not self.options.texts
        if self.folder is None or self.text is None or not (self._fits or is_sampled):
            return
        watch = self.runner.watch
        try:
            self.forget()
            self.folder.mkdir(parents=True)
            if is_sampled:
                np.save(self._text_file(self.folder), self.text.windows)
            for plan, fitted in self._fits.items():
                file = self._fit_file(self.folder, plan)
                write_trial(plan, self.runner.source, file, self.runner.binding, fitted)
        except (OSError, PopError) as error:
            watch.on_warning(PopError(f"the fit could not be saved: {error}"))
        else:
            watch.on_note(
                f"The fit is saved in {self.folder}; run the same command again to continue."
            )

    def forget(self) -> None:
        """Remove the kept fits and text, if any."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _text_file(self, folder: Path) -> Path:
        return folder / f"{self.runner.binding.header_sha256[:16]}.npy"

    def _fit_file(self, folder: Path, plan: Plan) -> Path:
        return folder / f"{plan.boundary}-{plan.projection}-{self.options.kv_type.value}.fit"

    def _kept_text(self, n_tokens: int) -> CalibrationText | None:
        """Return the kept text if it has `n_tokens` tokens, or None otherwise."""
        if self.folder is None or self.options.texts:
            return None
        with suppress(OSError, ValueError):
            windows = np.load(self._text_file(self.folder), allow_pickle=False)
            if windows.size == n_tokens:
                sha256 = hashlib.sha256(windows.tobytes()).hexdigest()
                return CalibrationText(DEFAULT_NAME, sha256, windows)
        return None

    def _kept_fits(self, plans: Sequence[Plan], text: CalibrationText) -> dict[Plan, Fitted]:
        """Return the kept fits that were computed from `text`."""
        if self.folder is None:
            return {}
        calibration = Calibration(text.name, text.sha256, text.n_tokens, self.options.ridge)
        fits = {}
        for plan in plans:
            file = self._fit_file(self.folder, plan)
            with suppress(FormatError, OSError):
                meta = read_sidecar(file, self.runner.source)
                if meta.calibration == calibration:
                    tensors = tuple(fitted_tensors(file).values())
                    fits[plan] = Fitted(calibration, tensors, meta.projection)
        return fits
