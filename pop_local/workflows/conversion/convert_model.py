"""The library's `convert` function."""

from __future__ import annotations

import os
from dataclasses import replace

from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.base.errors import PopError, StoppedError
from pop_converter.base.progress import Watch
from pop_converter.popfile.rewrite import check_target
from pop_local.calibration.texts import N_WINDOW
from pop_local.workflows.conversion.conversion_plan import (
    Conversion,
    ConversionRun,
    Converted,
    ConvertOptions,
    plan_conversion,
)
from pop_local.workflows.conversion.named import write_named
from pop_local.workflows.conversion.search import write_within
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.open import base_file


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
    watched = replace(watch, on_warning=warned)
    runner = TrialRunner(conversion.source, conversion.options.hardware, watched)
    run, budget = ConversionRun(conversion, force, runner), conversion.budget
    try:
        done = write_named(run) if budget is None else write_within(run, budget)
    except StoppedError:
        run.fitter.keep()
        raise
    if run.fitter.kept is not None:
        run.fitter.kept.remove()
    return replace(done, warnings=tuple(warnings))
