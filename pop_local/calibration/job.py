"""Calibration of one or several plans: read the text in passes, and solve the fits."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from pop_converter.base.errors import StoppedError
from pop_converter.base.progress import Progress
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration import texts
from pop_local.calibration.activations import WindowReader
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import FitPair, n_choosing, plan_needs
from pop_local.calibration.texts import N_WINDOW, CalibrationText, Windows
from pop_local.engine.learning.sums import Summing, Sums
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import Rows, TapRequest


@dataclass(frozen=True)
class Callbacks:
    """A calibration's callbacks: progress in tokens, and the caller's `should_stop`."""

    on_sampling: Progress
    on_reading: Progress
    should_stop: Callable[[], bool]

    def check_stop(self) -> None:
        """Raise StoppedError if the caller requests a stop."""
        if self.should_stop():
            raise StoppedError


@dataclass(frozen=True)
class Calibrated:
    """The fitted projections of each plan, and the text on which they were fitted."""

    fitted: tuple[Fitted, ...]
    text: CalibrationText


def calibrate(
    plans: Sequence[Plan],
    context: Context,
    source: Source,
    options: FitOptions,
    follow: Callbacks,
    text: CalibrationText | None = None,
) -> Calibrated:
    """Fit, for each plan, the projections of all skipped layers except the first.

    The plans must differ in their boundary or kind of fit. If memory allows, one pass over the text
    serves all plans (see `plan_needs`). `text`: the text of an earlier calibration with the same
    model and options. Raises PopError and StoppedError.
    """
    if text is None:
        text = _text(context, options, plans[0].shape.n_embd, follow)
    job = _Job(plans, context, source, options, follow, text.windows)
    groups = plan_needs(plans, source, options).groups
    for number, pairs in enumerate(groups):
        job.read(pairs, number, len(groups))
        job.solve(pairs)
    calibration = Calibration(text.name, text.sha256, text.n_tokens, options.ridge)
    fitted = tuple(
        Fitted(calibration, tuple(job.tensors[plan.boundary, plan.projection]), plan.projection)
        for plan in plans
    )
    return Calibrated(fitted, text)


def _text(context: Context, options: FitOptions, n_embd: int, follow: Callbacks) -> CalibrationText:
    count = options.n_tokens(n_embd) // N_WINDOW
    if options.texts:
        return texts.given_text(context, options.texts, count, n_embd)

    def sampled(done: int, total: int) -> None:
        follow.on_sampling(done, total)
        follow.check_stop()

    return texts.own_text(context, count, sampled)


class _Job:
    def __init__(
        self,
        plans: Sequence[Plan],
        context: Context,
        source: Source,
        options: FitOptions,
        follow: Callbacks,
        windows: Windows,
    ) -> None:
        self._context, self._options, self._follow = context, options, follow
        self._windows = windows
        projections: dict[int, list[Projection]] = {}
        for plan in plans:
            projections.setdefault(plan.boundary, []).append(plan.projection)
        self._summing = Summing(source, plans[0].shape, projections)
        self._sums = Sums()
        self.tensors: dict[tuple[int, Projection], list[NewTensor]] = {}

    def read(self, pairs: Sequence[FitPair], number: int, n_groups: int) -> None:
        """Sum the rows of all windows for a group of pairs."""
        boundaries = {pair.boundary for pair in pairs}
        self._choose_inputs(boundaries - self._sums.wides.keys())
        self._sums.grams.clear()
        for boundary in boundaries:
            layers = [pair.layer for pair in pairs if pair.boundary == boundary]
            self._sums.grams[boundary] = self._summing.empty(boundary, layers)
        reading = WindowReader(self._context, self._summing.wanted(boundaries))
        n_read, n_all = number * self._windows.size, n_groups * self._windows.size
        for window in self._windows:
            self._summing.add(self._sums, reading.window(window.tolist()))
            n_read += N_WINDOW
            self._follow.on_reading(n_read, n_all)
            self._follow.check_stop()

    def _choose_inputs(self, boundaries: Set[int]) -> None:
        """Choose the wide inputs from the states of windows that are spread over the text."""
        wanted = sorted(filter(self._summing.is_wide, boundaries))
        if not wanted:
            return
        n_windows = len(self._windows)
        n_chosen = min(n_windows, n_choosing(self._summing.shape.n_embd))
        seen: dict[int, list[Rows]] = {boundary: [] for boundary in wanted}
        reading = WindowReader(self._context, TapRequest(tuple(wanted)))
        for number in np.linspace(0, n_windows - 1, n_chosen).astype(int):
            tapped = reading.window(self._windows[number].tolist())
            for boundary in wanted:
                seen[boundary].append(self._summing.state(boundary, tapped)[1:])
            self._follow.check_stop()
        for boundary in wanted:
            self._follow.check_stop()
            chosen_input = self._summing.choose_input(boundary, seen.pop(boundary))
            self._sums.wides[boundary] = chosen_input

    def solve(self, pairs: Sequence[FitPair]) -> None:
        """Solve a group's projections from its sums, and add them to `tensors`."""
        options, summing = self._options, self._summing
        for boundary, layer in pairs:
            for kind in summing.projections[boundary]:
                tensors = self.tensors.setdefault((boundary, kind), [])
                if not tensors and kind == Projection.WIDE:
                    tensors += summing.encode_input(self._sums, boundary, options.kv_type)
                tensors += summing.solve(
                    self._sums.grams[boundary],
                    boundary,
                    layer,
                    kind,
                    options.ridge,
                    options.kv_type,
                )
                self._follow.check_stop()
