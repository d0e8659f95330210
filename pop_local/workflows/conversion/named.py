"""Convert a model at a given boundary: fit projections, measure the loss, and write the file."""

from dataclasses import replace
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.popfile.format import Measured
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import Projection
from pop_local.measure import budget as budgets
from pop_local.measure import lookups, quality
from pop_local.measure.budget import BALANCED
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import LookupSettings
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.conversion.conversion_plan import (
    ConversionRun,
    Converted,
    CopyingBrokenError,
)
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.measuring import measured

# Numbers of windows and look-up documents for measuring a fit.
N_WINDOWS = 8
N_DOCUMENTS = 5


def write_named(run: ConversionRun) -> Converted:
    """Fit projections at the plan's boundary, measure the loss, and write the model.

    The loss of a model without a fit is not measured. Raises PopError or StoppedError. Raises
    CopyingBrokenError if the model can no longer copy from its prompt, unless `run.force` is true.
    """
    [plan] = run.conversion.plans
    if plan.projection == Projection.OWN:
        run.runner.watch.on_note(
            "The loss was not measured, because the conversion fits no projections. To measure"
            " the loss, also set quality limits."
        )
        return run.write(plan, None, None)
    share = FullModel(run.runner, plan, QualitySettings(N_WINDOWS)).deep_share(plan.deep_rows)
    plan = replace(plan, deep_share=share)
    require_windows(run.runner, plan)
    fitter = run.fitter
    [fitted] = fitter.fit((plan,))
    if fitter.distiller is not None:
        fitted = fitter.distilled(replace(plan, projection=fitted.projection), fitted)
    return run.write(plan, fitted, lambda written: examine(run, plan, written))


def examine(run: ConversionRun, plan: Plan, written: Path) -> Measured:
    """Measure the converted model's loss. Raises CopyingBrokenError, PopError, or StoppedError."""
    watch, pruning = run.runner.watch, Pruning(plan.boundary)
    watch.on_note("Measuring the output file's loss on held-out text")
    with run.runner.opened(plan, run.conversion.files(written)) as model:
        tokens, settings = tokenize(model, shipped_text()), QualitySettings(N_WINDOWS)
        advance = watch.stage("Measuring")
        found = quality.measure_pruning(model, tokens, settings, pruning, advance)
        advance = watch.stage("Running look-ups")
        asked = LookupSettings(N_DOCUMENTS)
        answered = lookups.measure_lookups(model, asked, pruning, advance)
    figures = budgets.figures_in_words(found, answered)
    if not budgets.copies(found):
        error = CopyingBrokenError(plan.boundary, figures)
        if not run.force:
            raise error
        watch.on_warning(PopError(error.message))
    elif not (budgets.is_inside(BALANCED, found) and budgets.keeps_lookups(BALANCED, answered)):
        limits = budgets.limits_in_words(BALANCED)
        watch.on_warning(
            PopError(
                f"the loss at boundary {plan.boundary} ({figures}) exceeds the"
                f" {BALANCED.quality} budget ({limits})",
                "to find the fastest boundary within a budget, set only a budget",
                cause="outside-budget",
            )
        )
    return measured(found, answered)


def require_windows(runner: TrialRunner, plan: Plan) -> None:
    """Raise PopError if the plan's sink and tail rows make the loss impossible to measure."""
    try:
        with runner.opened(plan) as model, forced(model) as reader:
            tokens = tokenize(model, shipped_text())
            quality.choose_windows(reader, tokens, QualitySettings(N_WINDOWS))
    except PopError as error:
        raise PopError(
            f"the fit could not be measured: {error.message}",
            "lower sink_tokens and tail_tokens, or convert without fitting or measuring",
            cause="fit-not-measurable",
        ) from error
