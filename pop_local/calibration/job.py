"""Calibrate one or more plans: read the text in passes and solve for the projections."""

from collections.abc import Mapping, Sequence

import numpy as np

from pop_base.progress import Watch
from pop_converter.architecture.shape import ModelShape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, FitError, Gram, KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import WideInput, encode_input, wide_input
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
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import Rows, Tapped, TapRequest

# Number of last layers whose attention determines the row weights.
_N_WEIGHING = 4


def calibrate(
    plans: Sequence[Plan],
    context: Context,
    source: Source,
    options: FitOptions,
    watch: Watch,
    text: CalibrationText | None = None,
) -> tuple[Fitted, ...]:
    """Fit each plan's projections for all skipped layers except the first.

    No two plans may share both a boundary and a kind of fit. If memory allows, one pass over the
    text serves all plans (see `plan_needs`). `text`: text from an earlier calibration with the
    same settings. Progress is reported to `watch` in tokens. Raises PopError or StoppedError.
    """
    shape = plans[0].shape
    if text is None:
        text = calibration_text(context, options, shape.n_embd, watch)
    kinds: dict[int, list[Projection]] = {}
    for plan in plans:
        kinds.setdefault(plan.boundary, []).append(plan.projection)
    sums = _Sums(source, shape, kinds)
    tensors: dict[tuple[int, Projection], list[NewTensor]] = {}
    groups, n_read = plan_needs(plans, options).groups, 0
    advance = watch.stage("Fitting")
    for pairs in groups:
        wide = {b for b, _ in pairs if Projection.WIDE in kinds[b]} - sums.wides.keys()
        _choose_inputs(sums, context, text.windows, sorted(wide), watch)
        reader = WindowReader(context, sums.start(pairs))
        for window in text.windows:
            sums.add(reader.window(window.tolist()))
            n_read += N_WINDOW
            advance(n_read, len(groups) * text.n_tokens)
        for boundary, layer in pairs:
            for kind in kinds[boundary]:
                added = tensors.setdefault((boundary, kind), [])
                if not added and kind == Projection.WIDE:
                    added += encode_input(boundary, sums.wides[boundary], options.kv_type)
                added += sums.solve(boundary, layer, kind, options.ridge, options.kv_type)
                watch.check_stop()
    calibration = Calibration(text.name, text.sha256, text.n_tokens, options.ridge)
    return tuple(
        Fitted(calibration, tuple(tensors[plan.boundary, plan.projection]), plan.projection)
        for plan in plans
    )


def calibration_text(
    context: Context, options: FitOptions, n_embd: int, watch: Watch
) -> CalibrationText:
    """Return text from the files in `options`, or the default text if `options` names no files."""
    count = options.n_tokens(n_embd) // N_WINDOW
    if options.texts:
        return texts.given_text(context, options.texts, count, n_embd)
    return texts.own_text(context, count, watch.stage("Sampling text"))


class _Sums:
    """Sums over the rows of one pass, from which the fits are computed.

    `kinds`: the kinds of fits at each boundary. `wides`: the wide fits' additional inputs.
    """

    def __init__(
        self, source: Source, shape: ModelShape, kinds: Mapping[int, Sequence[Projection]]
    ) -> None:
        self.shape, self.weights = shape, Weights(source)
        self.wides: dict[int, WideInput] = {}
        self._kinds, self._grams = kinds, dict[int, Gram]()
        eps = source.first.of_arch("attention.layer_norm_rms_epsilon")
        self._eps = eps if isinstance(eps, float) else 0.0

    def start(self, pairs: Sequence[FitPair]) -> TapRequest:
        """Reset the sums for a pass that fits `pairs`. Return the tensors to tap."""
        boundaries, n_layer = tuple(sorted({boundary for boundary, _ in pairs})), self.shape.n_layer
        self._grams = {
            boundary: Gram.empty(
                max(self._n_inputs(boundary, kind) for kind in self._kinds[boundary]),
                {layer: self.shape.n_kv(layer) for b, layer in pairs if b == boundary},
            )
            for boundary in boundaries
        }
        # All boundaries share the same weighting layers, so that a fit does not depend on the other
        # boundaries.
        weighing = range(max(1, n_layer - _N_WEIGHING), n_layer)
        return TapRequest(boundaries, tuple(range(boundaries[0] + 1, n_layer)), tuple(weighing))

    def state(self, boundary: int, tapped: Tapped) -> Rows:
        """Return the normalized state [n_rows, n_embd]. Raises FitError for inf or NaN values."""
        state = tapped.states[boundary]
        if not np.isfinite(state).all():
            raise FitError(
                f"the output of layer {boundary - 1} contains NaN or infinity",
                DAMAGED_HINT,
                cause="not-finite",
            )
        return fit.normalised(state, self._eps)

    def add(self, tapped: Tapped) -> None:
        """Add all rows except the first, whose predecessor is not available.

        All layers share the mean row weights of the last _N_WEIGHING layers.
        """
        y = {layer: np.hstack([k, tapped.v[layer]])[1:] for layer, k in tapped.k.items()}
        weights = [fit.token_weights(mass[1:]) for mass in tapped.mass.values()]
        mean = np.mean(weights, axis=0) if weights else np.ones(tapped.n_rows - 1, np.float32)
        for boundary, gram in self._grams.items():
            x = self.state(boundary, tapped)
            parts = [x, self.wides[boundary](x)] if boundary in self.wides else [x]
            gram.add(fit.with_bias(*parts)[1:], y, mean)

    def solve(
        self, boundary: int, layer: int, kind: Projection, ridge: float, stored: KvType
    ) -> tuple[NewTensor, ...]:
        """Solve for a layer's fit at a boundary. Raises FitError if the sums are unusable."""
        own = self.weights.own_projection(layer, self.shape.n_k[layer], self.shape.n_v[layer])
        gram = self._grams[boundary].of_first(self._n_inputs(boundary, kind))
        return fit.encode(layer, fit.fit_layer(layer, gram, own, ridge), stored)

    def _n_inputs(self, boundary: int, kind: Projection) -> int:
        return self.shape.n_embd + self.shape.n_wide(boundary, kind)


def _choose_inputs(
    sums: _Sums, context: Context, windows: Windows, boundaries: Sequence[int], watch: Watch
) -> None:
    """Choose the inputs for wide fits, using windows spread evenly over the text."""
    if not boundaries:
        return
    n_windows = min(len(windows), n_choosing(sums.shape.n_embd))
    states: dict[int, list[Rows]] = {boundary: [] for boundary in boundaries}
    reader = WindowReader(context, TapRequest(tuple(boundaries)))
    for number in np.linspace(0, len(windows) - 1, n_windows).astype(int):
        tapped = reader.window(windows[number].tolist())
        for boundary in boundaries:
            states[boundary].append(sums.state(boundary, tapped)[1:])
        watch.check_stop()
    for boundary in boundaries:
        watch.check_stop()
        rows = states.pop(boundary)
        sums.wides[boundary] = wide_input(sums.shape, sums.weights, boundary, rows)
