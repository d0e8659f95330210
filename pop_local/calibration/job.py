"""The calibration of one plan or several: the pass over the text, and the fits from its sums."""

import hashlib
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, Gram
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import encode_input, wide_input
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.base.errors import StoppedError
from pop_local.base.progress import Progress
from pop_local.calibration.activations import Reading, Rows, reading
from pop_local.calibration.images import CalibrationImages, pictures_of
from pop_local.calibration.images import identity as images_identity
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.needs import Pair, plan_needs
from pop_local.calibration.options import FitOptions
from pop_local.calibration.state import State, load, save
from pop_local.calibration.texts import (
    N_WINDOW,
    CalibrationError,
    CalibrationText,
    given_text,
    own_text,
    sampled,
    whole_text,
)
from pop_local.engine.images.mmproj import ImageChunk
from pop_local.engine.images.pictures import Picture

# A state takes gigabytes for a large model.
SAVE_EVERY_S = 60.0
# Rows for each dimension of the state, by which the parts of a wider input are chosen.
_ROWS_PER_DIM = 2
_LEAST_WINDOWS = 4


@dataclass(frozen=True)
class Follow:
    """Who is told how far a calibration is (done_tokens, total_tokens), and who may end it."""

    on_sampling: Progress
    on_reading: Progress
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Calibrated:
    """One set of fitted projections for each plan, and the text that they were fitted on."""

    fitted: tuple[Fitted, ...]
    text: CalibrationText


def calibrate(
    plans: Sequence[Plan],
    model: LoadedModel,
    source: Source,
    options: FitOptions,
    follow: Follow,
    text: CalibrationText | None = None,
) -> Calibrated:
    """Fit for each plan the projections of all its skipped layers but the first.

    The plans have fitted projections, plain or wide, and differ in boundary or in these. One pass
    over the text serves all of them where memory allows (`plan_needs`). `text`: that of an earlier
    calibration of the same model with the same options, None to cut or sample it now.

    Raises PopError and StoppedError. With a state path the next call goes on from there, also after
    a finished one: the caller removes the file.
    """
    return _Job(plans, model, source, options, follow, text).run()


class _Job:
    """One calibration; it observes the model's layers as they are computed."""

    def __init__(
        self,
        plans: Sequence[Plan],
        model: LoadedModel,
        source: Source,
        options: FitOptions,
        follow: Follow,
        text: CalibrationText | None,
    ) -> None:
        self._plans, self._model, self._options, self._follow = plans, model, options, follow
        self._shape = plans[0].shape
        self._given = text
        self._fitted_layers = {plan.boundary: plan.fitted_layers for plan in plans}
        self._projections: dict[int, list[Projection]] = {}
        for plan in plans:
            self._projections.setdefault(plan.boundary, []).append(plan.projection)
        self._groups = plan_needs(plans, source, options).groups
        self._weights = Weights(source)
        self._eps = _rms_epsilon(source)
        pictures = pictures_of(options.images) if options.mmproj else ()
        self._identity = _identity(plans, source, options, self._groups, pictures)
        self._images = None
        if options.mmproj:
            self._images = CalibrationImages(model, options.mmproj, pictures, follow.should_stop)
        self._saved_s = time.monotonic()
        self._x: dict[int, Rows] = {}
        self._heads: dict[int, Rows] = {}
        self._y: dict[int, Rows] = {}
        self._token_weights: dict[int, Rows] = {}

    def run(self) -> Calibrated:
        try:
            return self._calibrated()
        finally:
            if self._images is not None:
                self._images.eye.close()

    def _calibrated(self) -> Calibrated:
        path = self._options.state_path
        # A kept state has its own groups: there may have been more memory then, or less.
        self._state = (path and load(path, self._identity)) or State(self._text(), self._groups)
        self._state.text = sampled(self._model, self._state.text, self._sampled)
        while self._state.group < len(self._state.groups):
            self._read(self._state.groups[self._state.group])
            self._solve()
            self._state.grams.clear()
            self._state.group += 1
            self._state.n_done = 0
        if path:
            save(path, self._identity, self._state)
        text, tensors, weighting = self._state.text, self._state.tensors, self._options.weighting
        n_image = self._images.n_rows if self._images else 0
        calibration = Calibration(
            text.name, text.sha256, text.n_tokens, self._options.ridge, weighting.value
        )
        fitted = tuple(
            Fitted(
                calibration,
                tuple(tensors[plan.boundary, plan.projection]),
                n_image,
                plan.projection,
            )
            for plan in self._plans
        )
        return Calibrated(fitted, text)

    def _text(self) -> CalibrationText:
        if self._given is not None:
            return self._given
        options, n_embd = self._options, self._shape.n_embd
        count = options.n_tokens(n_embd) // N_WINDOW
        if options.text:
            return given_text(self._model, options.text, count, n_embd)
        return own_text(self._model, count)

    def _sampled(self, done: int, total: int) -> None:
        self._follow.on_sampling(done, total)
        self._keep()

    def _read(self, pairs: Sequence[Pair]) -> None:
        state, n_text = self._state, len(self._state.text.windows)
        images = self._images.images if self._images else []
        n_all = n_text + len(images)
        boundaries = {pair.boundary for pair in pairs}
        self._choose_inputs(boundaries - state.wides.keys())
        for boundary in boundaries - state.grams.keys():
            widths = {p.layer: self._shape.n_kv(p.layer) for p in pairs if p.boundary == boundary}
            n_inputs = max(self._n_inputs(boundary, kind) for kind in self._projections[boundary])
            state.grams[boundary] = Gram.empty(n_inputs, widths)
        layers = {layer for boundary in boundaries for layer in self._fitted_layers[boundary]}
        with reading(
            self._model,
            self,
            boundaries=sorted(boundaries),
            layers=sorted(layers),
            heads=[each for each in boundaries if Projection.ATTENTION in self._projections[each]],
            n_window=N_WINDOW,
        ) as opened:
            while state.n_done < n_all:
                if state.n_done < n_text:
                    opened.window(state.text.windows[state.n_done].tolist())
                else:
                    self._read_image(opened, images[state.n_done - n_text])
                self._add()
                state.n_done += 1
                n_read = state.group * n_all + state.n_done
                n_passes = len(state.groups)
                self._follow.on_reading(n_read * N_WINDOW, n_passes * n_all * N_WINDOW)
                self._keep()

    def _read_image(self, opened: Reading, image: ImageChunk) -> None:
        assert self._images is not None
        eye = self._images.eye
        rows, positions = eye.embedded(image), eye.positions(image, 0)
        opened.image(rows, positions, is_mutual=image.is_mutual)

    def _choose_inputs(self, boundaries: Set[int]) -> None:
        """Choose the wider inputs by some windows, spread over the text."""
        wanted = sorted(
            each for each in boundaries if self._projections[each] != [Projection.FITTED]
        )
        if not wanted:
            return
        windows = self._state.text.windows
        n_least = -(-_ROWS_PER_DIM * self._shape.n_embd // N_WINDOW)
        n_chosen = min(len(windows), max(_LEAST_WINDOWS, n_least))
        chosen = np.linspace(0, len(windows) - 1, n_chosen).astype(int)
        seen: dict[int, list[Rows]] = {boundary: [] for boundary in wanted}
        with reading(self._model, self, boundaries=wanted, layers=(), n_window=N_WINDOW) as opened:
            for window in chosen:
                opened.window(windows[window].tolist())
                for boundary in wanted:
                    seen[boundary].append(self._x[boundary][1:])
                self._heed()
        for boundary in wanted:
            self._heed()
            self._state.wides[boundary] = wide_input(
                self._shape, self._weights, boundary, seen[boundary]
            )

    def _keep(self) -> None:
        self._heed()
        path = self._options.state_path
        if path and time.monotonic() - self._saved_s > SAVE_EVERY_S:
            save(path, self._identity, self._state)
            self._saved_s = time.monotonic()

    def _heed(self) -> None:
        """Keep what there is and raise StoppedError where that is wanted."""
        if not self._follow.should_stop():
            return
        if path := self._options.state_path:
            save(path, self._identity, self._state)
        raise StoppedError

    # The observer: position 0 is left out, since the first token always runs in full.

    def state(self, boundary: int, rows: Rows) -> None:
        if not np.isfinite(rows).all():
            raise CalibrationError(
                f"what layer {boundary - 1} of the model computes is not finite",
                DAMAGED_HINT,
                cause="not-finite",
            )
        self._x[boundary] = fit.normalised(rows, self._eps)

    def layer(self, layer: int, k: Rows, v: Rows, mass: Rows) -> None:
        self._y[layer] = np.concatenate([k, v], axis=1)[1:]
        self._token_weights[layer] = fit.token_weights(mass[1:], self._options.weighting)

    def heads(self, layer: int, rows: Rows) -> None:
        self._heads[layer] = rows.copy()

    def _inputs(self, boundary: int) -> list[Rows]:
        """The inputs of the fits at a boundary, the narrowest kind's first."""
        x, wide = self._x[boundary], self._state.wides.get(boundary)
        parts = [x] if wide is None else [x, wide(x)]
        if Projection.ATTENTION in self._projections[boundary]:
            parts.append(self._heads[boundary])
        return parts

    def _n_inputs(self, boundary: int, projection: Projection) -> int:
        return self._shape.n_embd + self._shape.n_wide(boundary, projection)

    def _add(self) -> None:
        """Add the window that was read; a boundary's layers share one weighting, their mean."""
        for boundary, gram in self._state.grams.items():
            weights = [self._token_weights[layer] for layer in self._fitted_layers[boundary]]
            inputs = fit.with_bias(*self._inputs(boundary))
            gram.add(inputs[1:], self._y, np.mean(weights, axis=0))

    def _solve(self) -> None:
        """Put all projections of a group into the state at once.

        After a stop in between, the whole group is solved again.
        """
        shape = self._shape
        solved: list[tuple[tuple[int, Projection], NewTensor]] = []
        for boundary, layer in self._state.groups[self._state.group]:
            gram = self._state.grams[boundary]
            own = self._weights.own_projection(layer, shape.n_k[layer], shape.n_v[layer])
            for projection in self._projections[boundary]:
                sums = gram.of_first(self._n_inputs(boundary, projection))
                fitted = fit.fit_layer(layer, sums, own, self._options.ridge)
                tensors = fit.encode(layer, fitted, self._options.kv_type)
                solved += [((boundary, projection), tensor) for tensor in tensors]
                self._heed()
        for key, tensor in solved:
            if key not in self._state.tensors and key[1] != Projection.FITTED:
                made = self._state.wides[key[0]]
                inputs = encode_input(key[0], made, self._options.kv_type)
                self._state.tensors[key] = [*inputs]
            self._state.tensors.setdefault(key, []).append(tensor)


def _rms_epsilon(source: Source) -> float:
    value = source.first.of_arch("attention.layer_norm_rms_epsilon")
    return value if isinstance(value, float) else 0.0


def _identity(
    plans: Sequence[Plan],
    source: Source,
    options: FitOptions,
    groups: tuple[tuple[Pair, ...], ...],
    pictures: Sequence[Picture],
) -> str:
    """Return a text that differs wherever two calibrations would."""
    parts: list[object] = [part.path.stat().st_mtime_ns for part in source.parts]
    if options.text:
        parts.append(hashlib.sha256(whole_text(options.text).encode()).hexdigest())
    if options.mmproj:
        parts.append(images_identity(options.mmproj, pictures))
    parts += [source.name, source.size_bytes]
    parts += [(plan.schedule, plan.projection) for plan in plans]
    parts += [*map(tuple, chain.from_iterable(groups)), options.n_tokens(plans[0].shape.n_embd)]
    parts += [options.ridge, options.weighting.value, options.kv_type.value]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
