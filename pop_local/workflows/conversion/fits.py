"""Fit and distill all of a model's plans on the same sampled text."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pop_converter.base.errors import FormatError, PopError
from pop_converter.base.progress import Watch
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


@dataclass(frozen=True)
class KeptFits:
    """A folder of fits next to a conversion's output. The folder need not exist yet.

    The text file's name contains the model's hash. Each fit is stored as a sidecar.
    """

    folder: Path
    runner: TrialRunner
    options: FitOptions

    @property
    def _text(self) -> Path:
        return self.folder / f"{self.runner.binding.header_sha256[:16]}.npy"

    def _file(self, plan: Plan) -> Path:
        return self.folder / f"{plan.boundary}-{plan.projection}-{self.options.kv_type.value}.fit"

    def text(self, n_tokens: int) -> CalibrationText | None:
        """Return the saved text if it contains `n_tokens` tokens, or None otherwise."""
        with suppress(OSError, ValueError):
            windows = np.load(self._text, allow_pickle=False)
            if windows.size == n_tokens and not self.options.texts:
                sha256 = hashlib.sha256(windows.tobytes()).hexdigest()
                return CalibrationText(DEFAULT_NAME, sha256, windows)
        return None

    def fits(self, plans: Sequence[Plan], text: CalibrationText) -> dict[Plan, Fitted]:
        """Return the saved fits that were computed from `text`."""
        wanted = Calibration(text.name, text.sha256, text.n_tokens, self.options.ridge)
        found = {}
        for plan in plans:
            with suppress(FormatError, OSError):
                meta = read_sidecar(self._file(plan), self.runner.source)
                if meta.calibration == wanted:
                    tensors = tuple(fitted_tensors(self._file(plan)).values())
                    found[plan] = Fitted(wanted, tensors, meta.projection)
        return found

    def save(self, text: CalibrationText, fits: Mapping[Plan, Fitted]) -> None:
        """Save the fits, and the text if the model generated it. Raises OSError or WriteError."""
        self.remove()
        self.folder.mkdir(parents=True)
        if not self.options.texts:
            np.save(self._text, text.windows)
        for plan, fitted in fits.items():
            write_trial(plan, self.runner.source, self._file(plan), self.runner.binding, fitted)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


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
    `kept` holds the fits from an earlier conversion that was stopped (None: keep no fits).
    """

    runner: TrialRunner
    options: FitOptions
    text: CalibrationText | None = None
    kind: Projection | None = None
    distiller: Distilling | None = None
    kept: KeptFits | None = None
    _made: dict[Plan, Fitted] = field(default_factory=dict)

    def fit(self, plans: Sequence[Plan]) -> tuple[Fitted, ...]:
        """Fit all plans on the same text. Raises PopError or StoppedError."""
        if not plans:
            return ()
        self.kind = self.kind or fit_kind(plans[0], self.options)
        options = replace(self.options, projection=self.kind)
        wanted = [replace(plan, projection=self.kind) for plan in plans]
        watch, n_embd = self.runner.watch, plans[0].shape.n_embd
        if self.text is None and self.kept is not None:
            self.text = self.kept.text(options.n_tokens(n_embd))
        with loaded(self.runner.path, **vars(self.runner.hardware)) as context:
            if self.text is None:
                self.text = calibration_text(context, options, n_embd, watch)
            if self.kept is not None and (known := self.kept.fits(wanted, self.text)):
                watch.on_note(f"Reusing {len(known)} fits from {self.kept.folder}.")
                self._made |= known
            if missing := [plan for plan in wanted if plan not in self._made]:
                done = calibrate(missing, context, self.runner.source, options, watch, self.text)
                self._made |= zip(missing, done.fitted, strict=True)
        return tuple(self._made[plan] for plan in wanted)

    def keep(self) -> None:
        """Save the sampled text and the fits from a stopped conversion, and notify the user."""
        if self.kept is None or self.text is None or not (self._made or not self.options.texts):
            return
        watch = self.runner.watch
        try:
            self.kept.save(self.text, self._made)
        except (OSError, PopError) as error:
            watch.on_warning(PopError(f"the fit could not be saved: {error}"))
        else:
            where = self.kept.folder
            watch.on_note(f"The fit is saved in {where}; run the same command again to continue.")

    def distilled(self, plan: Plan, fitted: Fitted) -> Fitted:
        """Train a plan's fit end to end and return the result. Raises PopError or StoppedError."""
        assert self.distiller is not None and self.text is not None, "nothing was fitted"
        return self.distiller.train(plan, fitted, self.text)
