"""Calibration of one or several plans: read the text in passes, and solve the fits."""

import hashlib
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import chain

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
from pop_local.calibration.state import CalibrationState, load, save
from pop_local.calibration.texts import N_WINDOW, CalibrationText
from pop_local.engine.learning.sums import Summing
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import Rows, TapRequest

# The minimum time between two saves, since a large model's state takes gigabytes.
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Callbacks:
    """A calibration's callbacks: progress in tokens, and the caller's `should_stop`."""

    on_sampling: Progress
    on_reading: Progress
    should_stop: Callable[[], bool]


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
    model and options. If the options have a state path, the next call resumes a stopped
    calibration, and the caller must delete the file. Raises PopError and StoppedError.
    """
    return _Job(plans, context, source, options, follow, text).run()


class _Job:
    def __init__(
        self,
        plans: Sequence[Plan],
        context: Context,
        source: Source,
        options: FitOptions,
        follow: Callbacks,
        text: CalibrationText | None,
    ) -> None:
        self._plans, self._context, self._options, self._follow = plans, context, options, follow
        self._shape = plans[0].shape
        self._given = text
        projections: dict[int, list[Projection]] = {}
        for plan in plans:
            projections.setdefault(plan.boundary, []).append(plan.projection)
        self._summing = Summing(source, self._shape, projections)
        self._groups = plan_needs(plans, source, options).groups
        self._identity = _identity(plans, source, options, self._groups)
        self._saved_s = time.monotonic()

    def run(self) -> Calibrated:
        path = self._options.state_path
        # Groups depend on free memory, so a stored state keeps the groups of its first run.
        self._state = (path and load(path, self._identity)) or CalibrationState(
            self._text(), self._groups
        )
        self._state.text = texts.sampled(self._context, self._state.text, self._sampled)
        while self._state.group < len(self._state.groups):
            self._read(self._state.groups[self._state.group])
            self._solve()
            self._state.sums.grams.clear()
            self._state.group += 1
            self._state.n_done = 0
        if path:
            save(path, self._identity, self._state)
        text, tensors = self._state.text, self._state.tensors
        calibration = Calibration(text.name, text.sha256, text.n_tokens, self._options.ridge)
        fitted = tuple(
            Fitted(calibration, tuple(tensors[plan.boundary, plan.projection]), plan.projection)
            for plan in self._plans
        )
        return Calibrated(fitted, text)

    def _text(self) -> CalibrationText:
        if self._given is not None:
            return self._given
        options, n_embd = self._options, self._shape.n_embd
        count = options.n_tokens(n_embd) // N_WINDOW
        if options.texts:
            return texts.given_text(self._context, options.texts, count, n_embd)
        return texts.own_text(self._context, count)

    def _sampled(self, done: int, total: int) -> None:
        self._follow.on_sampling(done, total)
        self._save_sometimes()

    def _read(self, pairs: Sequence[FitPair]) -> None:
        state, windows = self._state, self._state.text.windows
        boundaries = {pair.boundary for pair in pairs}
        self._choose_inputs(boundaries - state.sums.wides.keys())
        for boundary in boundaries - state.sums.grams.keys():
            layers = [pair.layer for pair in pairs if pair.boundary == boundary]
            state.sums.grams[boundary] = self._summing.empty(boundary, layers)
        wanted = self._summing.wanted(boundaries)
        reading = WindowReader(self._context, wanted)
        while state.n_done < len(windows):
            self._summing.add(state.sums, reading.window(windows[state.n_done].tolist()))
            state.n_done += 1
            n_read = state.group * windows.size + state.n_done * N_WINDOW
            self._follow.on_reading(n_read, len(state.groups) * windows.size)
            self._save_sometimes()

    def _choose_inputs(self, boundaries: Set[int]) -> None:
        """Choose the wider inputs from the states of windows that are spread over the text."""
        wanted = sorted(filter(self._summing.is_wide, boundaries))
        if not wanted:
            return
        windows = self._state.text.windows
        n_chosen = min(len(windows), n_choosing(self._shape.n_embd))
        chosen = np.linspace(0, len(windows) - 1, n_chosen).astype(int)
        seen: dict[int, list[Rows]] = {boundary: [] for boundary in wanted}
        reading = WindowReader(self._context, TapRequest(tuple(wanted)))
        for window in chosen:
            tapped = reading.window(windows[window].tolist())
            for boundary in wanted:
                seen[boundary].append(self._summing.state(boundary, tapped)[1:])
            self._check_stop()
        for boundary in wanted:
            self._check_stop()
            chosen_input = self._summing.choose_input(boundary, seen.pop(boundary))
            self._state.sums.wides[boundary] = chosen_input

    def _save_sometimes(self) -> None:
        self._check_stop()
        path = self._options.state_path
        if path and time.monotonic() - self._saved_s > SAVE_EVERY_S:
            save(path, self._identity, self._state)
            self._saved_s = time.monotonic()

    def _check_stop(self) -> None:
        """Store the state and raise StoppedError if the caller requests a stop."""
        if not self._follow.should_stop():
            return
        if path := self._options.state_path:
            save(path, self._identity, self._state)
        raise StoppedError

    def _solve(self) -> None:
        """Solve a group's projections, and add all of them to the state at the end.

        A stop therefore loses the whole group's projections.
        """
        state, options, summing = self._state, self._options, self._summing
        solved: list[tuple[tuple[int, Projection], NewTensor]] = []
        for boundary, layer in state.groups[state.group]:
            gram = state.sums.grams[boundary]
            for kind in summing.projections[boundary]:
                tensors = summing.solve(gram, boundary, layer, kind, options.ridge, options.kv_type)
                solved += [((boundary, kind), tensor) for tensor in tensors]
                self._check_stop()
        for key, tensor in solved:
            if key not in state.tensors and key[1] != Projection.FITTED:
                state.tensors[key] = [*summing.encode_input(state.sums, key[0], options.kv_type)]
            state.tensors.setdefault(key, []).append(tensor)


def _identity(
    plans: Sequence[Plan],
    source: Source,
    options: FitOptions,
    groups: tuple[tuple[FitPair, ...], ...],
) -> str:
    """Return a hash of all inputs that determine a calibration's result."""
    parts: list[object] = [part.path.stat().st_mtime_ns for part in source.parts]
    n_tokens = options.n_tokens(plans[0].shape.n_embd)
    if options.texts:
        parts.append(texts.given_sha256(options.texts, n_tokens // N_WINDOW))
    parts += [source.name, source.size_bytes]
    parts += [(plan.schedule, plan.projection) for plan in plans]
    parts += [*map(tuple, chain.from_iterable(groups)), n_tokens]
    parts += [options.ridge, options.kv_type.value]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
