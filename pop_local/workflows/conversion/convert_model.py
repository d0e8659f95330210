"""Run conversions: fit projections, measure the loss, and write the file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pop_base.errors import PopError
from pop_base.progress import Unit, Watch
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.popfile.format import Budget, Measured
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Examine, Fitted, check_target
from pop_converter.popfile.rewrite import convert as write_copy
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import N_WINDOW
from pop_local.measure import budget as budgets
from pop_local.measure.budget import BALANCED
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import LookupSettings, measure_lookups
from pop_local.measure.quality import QualitySettings, measure_pruning
from pop_local.workflows.conversion.conversion_plan import (
    Conversion,
    Converted,
    ConvertOptions,
    CopyingBrokenError,
    Trial,
    plan_conversion,
)
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.search import Search
from pop_local.workflows.conversion.trial_runner import FullModel, TrialRunner
from pop_local.workflows.measuring import stored_metrics
from pop_local.workflows.open import base_file

# Numbers of windows and look-up documents for measuring a fit at a named boundary.
N_WINDOWS = 8
N_DOCUMENTS = 5


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: ConvertOptions = ConvertOptions(),
    *,
    force: bool = False,
    watch: Watch = Watch(),
) -> Converted:
    """Convert a model so that it reads long prompts faster. `model` is a path or a name.

    `out` is the output's path (default: NAME.pop.gguf or NAME.pop-sidecar.gguf next to the model).
    `force`: overwrite an existing output. If the options set a boundary but no budget, also accept
    a model that can no longer copy from its prompt.

    If the conversion fails, raises PopError or a subclass, such as OutputExistsError,
    OverBudgetError, or CopyingBrokenError. Raises StoppedError if `watch.should_stop` returns True.
    If an error occurs, any existing output file is left unchanged.
    """
    planned = plan_conversion(base_file(os.fspath(model), watch), out, options)
    return run_conversion(planned, force=force, watch=watch)


def run_conversion(
    conversion: Conversion, *, force: bool = False, watch: Watch = Watch()
) -> Converted:
    """Run a planned conversion. The arguments, result, and errors are the same as for `convert`."""
    check_target(conversion.path, conversion.target, conversion.sizes, force=force)
    warnings: list[PopError] = []

    def warned(error: PopError) -> None:
        warnings.append(error)
        watch.on_warning(error)

    trained = trained_ctx(conversion.source.first)
    if trained is not None and 0 < trained < N_WINDOW:
        warned(
            PopError(
                f"the model was trained on contexts of {trained:,} tokens, but the measurement"
                f" uses windows of {N_WINDOW:,} tokens",
                "do not rely on the measured loss",
            )
        )
    runner = TrialRunner(
        conversion.source, conversion.options.hardware, replace(watch, on_warning=warned)
    )
    run = ConversionRun(conversion, runner, force=force)
    done = run.named() if conversion.budget is None else run.within(conversion.budget)
    return replace(done, warnings=tuple(warnings))


@dataclass(frozen=True)
class ConversionRun:
    """A running conversion (see `convert`)."""

    conversion: Conversion
    runner: TrialRunner
    force: bool

    @cached_property
    def fitter(self) -> PlanFitter:
        runner, fit = self.runner, self.conversion.fit or FitOptions()
        make = self.conversion.options.distiller
        distiller = make and make(runner.source, fit, runner.hardware, runner.watch)
        return PlanFitter(runner, fit, distiller)

    def within(self, budget: Budget) -> Converted:
        """Find the fastest plan within the budget, and write the converted file.

        Raises OverBudgetError, PopError, or StoppedError.
        """
        planned = self.conversion
        full = FullModel(self.runner, planned.plans[0])
        search = Search(self.runner, budget, self.fitter, full, planned.tried)
        best = search.run()
        metrics = stored_metrics(best.quality, best.lookups)
        return self._write(best.plan, best.fitted, lambda _: metrics, search.trials)

    def named(self) -> Converted:
        """Fit projections at the plan's boundary, measure the loss, and write the model.

        The loss of a model without a fit is not measured. Raises PopError or StoppedError. Raises
        CopyingBrokenError if the model can no longer copy from its prompt, unless `force` is true.
        """
        [plan] = self.conversion.plans
        if plan.projection == Projection.OWN:
            self.runner.watch.on_note(
                "The loss was not measured, because the conversion fits no projections. To measure"
                " the loss, also set quality limits."
            )
            return self._write(plan, None, None)
        share = FullModel(self.runner, plan).deep_share(plan.deep_rows)
        plan = replace(plan, deep_share=share)
        [fitted] = self.fitter.fit((plan,))
        if self.fitter.distiller is not None:
            fitted = self.fitter.distill(replace(plan, projection=fitted.projection), fitted)
        return self._write(plan, fitted, lambda written: self._examine(plan, written))

    def _examine(self, plan: Plan, written: Path) -> Measured:
        """Measure the converted model's loss. Raises CopyingBrokenError if it cannot copy."""
        watch, pruning = self.runner.watch, Pruning(plan.boundary)
        watch.on_note("Measuring the output file's loss on held-out text")
        with self.runner.opened(plan, self.conversion.files(written)) as model:
            tokens, settings = tokenize(model, shipped_text()), QualitySettings(N_WINDOWS)
            quality = measure_pruning(model, tokens, settings, pruning, watch.stage("Measuring"))
            advance = watch.stage("Running look-ups")
            lookups = measure_lookups(model, LookupSettings(N_DOCUMENTS), pruning, advance)
        figures = budgets.figures_in_words(quality, lookups)
        if not budgets.copies(quality):
            error = CopyingBrokenError(plan.boundary, figures)
            if not self.force:
                raise error
            watch.on_warning(PopError(error.message))
        elif not (
            budgets.is_inside(BALANCED, quality) and budgets.keeps_lookups(BALANCED, lookups)
        ):
            limits = budgets.limits_in_words(BALANCED)
            watch.on_warning(
                PopError(
                    f"the loss at boundary {plan.boundary} ({figures}) exceeds the"
                    f" {BALANCED.quality} budget ({limits})",
                    "to find the fastest boundary within a budget, set only a budget",
                    cause="outside-budget",
                )
            )
        return stored_metrics(quality, lookups)

    def _write(
        self,
        plan: Plan,
        fitted: Fitted | None,
        examine: Examine | None,
        trials: tuple[Trial, ...] = (),
    ) -> Converted:
        """Write the plan's output file, including any fit. Raises PopError or StoppedError."""
        planned, watch = self.conversion, self.runner.watch
        write = write_sidecar if planned.is_sidecar else write_copy
        name = "Reading the model" if planned.is_sidecar else "Writing and verifying"
        advance = watch.stage(name, Unit.BYTES)

        def examine_in_stage(written: Path) -> Measured:
            assert examine is not None
            metrics = examine(written)
            watch.on_stage(name, Unit.BYTES)
            return metrics

        meta = write(
            plan,
            planned.path,
            planned.target,
            fitted=fitted,
            examine=examine and examine_in_stage,
            progress=advance,
            force=self.force,
        )
        is_distilled = meta.calibration is not None and meta.calibration.n_distilled > 0
        plan = replace(plan, projection=meta.projection, is_distilled=is_distilled)
        return Converted(planned.target, plan, meta, planned.sizes_of(plan), trials)
