"""Fits of one model, whose text is sampled once however many there are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converter.plan import Plan
from converter.rewrite import Fitted
from converter.source import Source
from pop_local.calibration.job import Follow, calibrate
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import CalibrationText
from pop_local.workflows.events import Progress, Watch
from pop_local.workflows.options import Hardware


class Fitter:
    """Fits plans of one model, all with the same options and on the same text."""

    def __init__(
        self, source: Source, options: FitOptions, hardware: Hardware, watch: Watch
    ) -> None:
        self._source, self._options = source, options
        self._hardware, self._watch = hardware, watch
        self._text: CalibrationText | None = None

    def fit(self, plans: Sequence[Plan], state_path: Path | None) -> tuple[Fitted, ...]:
        """Fit each plan in one go. Raises PopError, and StoppedError when the watch says so.

        With `state_path`, what was read or fitted is kept there, and taken from there.
        """
        if not plans:
            return ()
        follow = Follow(
            self._lazily("Sampling text"), self._lazily("Fitting"), self._watch.should_stop
        )
        opened = LoadedModel(
            self._source.first.path,
            n_gpu_layers=self._hardware.n_gpu_layers,
            n_threads=self._hardware.n_threads,
        )
        options = replace(self._options, state_path=state_path)
        with opened as model:
            done = calibrate(plans, model, self._source, options, follow, self._text)
        self._text = done.text
        return done.fitted

    def _lazily(self, name: str) -> Progress:
        """A stage that begins when its work does: a kept fit has none of it."""
        begun = False

        def advance(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                self._watch.stage(name)
                begun = True
            self._watch.on_progress(done, total)

        return advance
