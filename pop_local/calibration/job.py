"""Calibrate one or more plans: read the text in passes and solve for the projections."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from pop_base.progress import Watch
from pop_converter.fit.wide import WideInput, encode_input
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration import texts
from pop_local.calibration.activations import WindowReader
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import n_choosing, plan_needs
from pop_local.calibration.sums import Summing, Sums
from pop_local.calibration.texts import N_WINDOW, CalibrationText, Windows
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import Rows, TapRequest


@dataclass(frozen=True)
class Calibrated:
    """Each plan's fitted projections, and the text used for fitting."""

    fitted: tuple[Fitted, ...]
    text: CalibrationText


def calibrate(
    plans: Sequence[Plan],
    context: Context,
    source: Source,
    options: FitOptions,
    watch: Watch,
    text: CalibrationText | None = None,
) -> Calibrated:
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
    summing, sums = Summing(source, shape, kinds), Sums()
    tensors: dict[tuple[int, Projection], list[NewTensor]] = {}
    groups, n_read = plan_needs(plans, source, options).groups, 0
    advance = watch.stage("Fitting")
    for pairs in groups:
        boundaries = {pair.boundary for pair in pairs}
        unknown = boundaries - sums.wides.keys()
        sums.wides |= _choose_inputs(summing, context, text.windows, unknown, watch)
        layers = {each: [layer for b, layer in pairs if b == each] for each in boundaries}
        sums.grams = {each: summing.empty(each, layers[each]) for each in boundaries}
        reader = WindowReader(context, summing.wanted(boundaries))
        for window in text.windows:
            summing.add(sums, reader.window(window.tolist()))
            n_read += N_WINDOW
            advance(n_read, len(groups) * text.n_tokens)
        for boundary, layer in pairs:
            for kind in kinds[boundary]:
                made = tensors.setdefault((boundary, kind), [])
                if not made and kind == Projection.WIDE:
                    made += encode_input(boundary, sums.wides[boundary], options.kv_type)
                gram, stored = sums.grams[boundary], options.kv_type
                made += summing.solve(gram, boundary, layer, kind, options.ridge, stored)
                watch.check_stop()
    calibration = Calibration(text.name, text.sha256, text.n_tokens, options.ridge)
    fitted = tuple(
        Fitted(calibration, tuple(tensors[plan.boundary, plan.projection]), plan.projection)
        for plan in plans
    )
    return Calibrated(fitted, text)


def calibration_text(
    context: Context, options: FitOptions, n_embd: int, watch: Watch
) -> CalibrationText:
    """Return text from the files in `options`, or the default text if `options` names no files."""
    count = options.n_tokens(n_embd) // N_WINDOW
    if options.texts:
        return texts.given_text(context, options.texts, count, n_embd)
    return texts.own_text(context, count, watch.stage("Sampling text"))


def _choose_inputs(
    summing: Summing, context: Context, windows: Windows, boundaries: Set[int], watch: Watch
) -> dict[int, WideInput]:
    """Choose the inputs for wide fits, using windows spread evenly over the text."""
    wanted = sorted(filter(summing.is_wide, boundaries))
    if not wanted:
        return {}
    n_chosen = min(len(windows), n_choosing(summing.shape.n_embd))
    seen: dict[int, list[Rows]] = {boundary: [] for boundary in wanted}
    reader = WindowReader(context, TapRequest(tuple(wanted)))
    for number in np.linspace(0, len(windows) - 1, n_chosen).astype(int):
        tapped = reader.window(windows[number].tolist())
        for boundary in wanted:
            seen[boundary].append(summing.state(boundary, tapped)[1:])
        watch.check_stop()
    chosen = {}
    for boundary in wanted:
        watch.check_stop()
        chosen[boundary] = summing.choose_input(boundary, seen.pop(boundary))
    return chosen
