"""`pop-local convert IN.gguf [OUT.gguf]`: write a prunable copy of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.rewrite import check_target
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.commands import shared_options as opt
from pop_local.commands.opening import warn_if_busy
from pop_local.commands.option_expansion import EXPERT, Group, expand_options, option
from pop_local.measure.budget import BALANCED, BUDGETS
from pop_local.models.sidecars import is_shipped, sidecar_of
from pop_local.ui.console import note
from pop_local.ui.tables import print_json
from pop_local.ui.views import convert as view
from pop_local.ui.watch import stoppable_watch, terminal_watch
from pop_local.workflows.conversion.conversion_plan import (
    Boundary,
    ConvertOptions,
    Goal,
    OverBudgetError,
    Within,
    plan_conversion,
)
from pop_local.workflows.conversion.convert_model import run_conversion
from pop_local.workflows.open import base_file

QualityName = Literal["near-lossless", "balanced", "fast"]


@dataclass(frozen=True)
class HowOptions(Group):
    boundary: int | None = option("First layer to skip (default: determined by search).", "LAYER")
    quality: QualityName | None = option(
        "Quality level: near-lossless, balanced, or fast. Each level limits the loss of quality."
        f" The default is {BALANCED.quality}, or an unlimited loss if you pass --boundary.",
        "LEVEL",
    )
    projection: Projection | None = option(
        "K/V projections for skipped layers. own: needs no fit, but reduces quality more than a fit"
        " does. fitted: takes minutes. fitted-wide: uses more inputs than fitted. The default"
        " is fitted-wide if it is almost as fast as fitted.",
        "KIND",
    )
    text: list[Path] | None = option(
        "Text file for the fit (default: look-ups, documentation, code, and text sampled"
        " from the model). Repeat this option to mix equal shares of several texts.",
        "FILE",
    )
    distill: bool = option(
        "Also train the fitted projections end to end to improve copying. Training takes several"
        " minutes per boundary, needs torch, and works only for dense llama, qwen2, qwen3, and"
        " gemma3 models.",
        default=False,
    )
    sidecar: bool = option("Write a small sidecar file instead of a copy.", default=False)
    dry_run: bool = option("Print the plan without writing anything.", default=False)
    force: bool = option(
        "Replace an existing output file. With --boundary and no quality limit, write"
        " the model even if it can no longer copy from its prompt.",
        flag="--force -f",
        default=False,
    )


def _limit(unit: str, words: str) -> Any:
    return option(words, unit, min=0.0, callback=opt.positive)


@dataclass(frozen=True)
class LimitOptions(Group):
    panel: ClassVar[str] = EXPERT

    max_kl: float | None = _limit("NATS", "Maximum KL divergence from the full model.")
    max_ppl_ratio: float | None = _limit("RATIO", "Maximum perplexity relative to the full model.")
    max_copy_ratio: float | None = _limit("RATIO", "Maximum perplexity ratio on repeated text.")


@dataclass(frozen=True)
class FittingOptions(Group):
    panel: ClassVar[str] = EXPERT

    deep_rows: DeepRows = option(
        "Rule that selects words to run through all layers.", default=ConvertOptions.deep_rows
    )
    tokens: int | None = option(
        "Number of tokens for the fit (default: 24 per embedding dimension, but at least 16384)."
        " With --distill, training uses at least 65536 tokens.",
        min=1,
    )
    memory: float | None = option(
        "Memory limit for the fit's statistics (default: half of the free memory).",
        "GB",
        min=0.0,
        max=1e9,
        callback=opt.finite,
    )

    def fit(self, texts: Sequence[Path]) -> FitOptions | None:
        """Return the options for a fit on `texts`, or None if no option is set."""
        options = opt.given(
            tokens=self.tokens,
            texts=tuple(texts) or None,
            memory_bytes=None if self.memory is None else int(self.memory * 10**9),
        )
        return FitOptions(**options) if options else None


@expand_options
def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="IN.gguf", help="A GGUF model, or the first file of a split model."),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT.gguf", help="Output file (default: IN.pop.gguf in the same folder)."
        ),
    ] = None,
    *,
    how: HowOptions,
    json: opt.Json = False,
    limits: LimitOptions,
    fitting: FittingOptions,
    processors: opt.HardwareOptions,
) -> None:
    """Create a copy of a model. The copy reads long prompts faster.

    --quality limits the quality loss and therefore the number of skipped layers. With --quality
    near-lossless, perplexity may rise by up to 1% on held-out text and by up to 2% on a repeated
    passage. --quality balanced raises the limits to 3% and 10%, and --quality fast raises them to
    6% and 30%. --dry-run prints all limits. To choose the skipped layers yourself, use --boundary.

    The copy contains the model's weights and fitted K/V projections for the skipped layers. Only
    pop-local can open the copy. The command measures the quality loss and stores it in the copy.
    With --projection own, the copy has no new weights, and stock llama.cpp can open it.
    """
    named = None if how.boundary is None else Boundary(how.boundary)
    own = opt.given(**vars(limits))
    fit = fitting.fit(how.text or ())
    if how.projection is Projection.OWN and (fit or how.distill):
        raise typer.BadParameter("`--projection own` cannot be combined with options for a fit")
    fit = replace(fit or FitOptions(), projection=how.projection)
    distiller = None
    if how.distill:
        from pop_local.research.distilled import Distiller

        distiller = Distiller
    options = ConvertOptions(
        goal=_goal(how.quality, own, named),
        fit=None if how.projection is Projection.OWN else fit,
        deep_rows=fitting.deep_rows,
        output="sidecar" if how.sidecar else "copy",
        distiller=distiller,
        hardware=processors.hardware,
    )
    with terminal_watch() as watch:
        base = base_file(model, watch)
    planned = plan_conversion(base, output, options)
    if (sidecar := sidecar_of(planned.source)) and is_shipped(sidecar):
        note(
            "Fast reading already works with this model: pop-local ships the sidecar"
            f" {sidecar.name}."
        )
    # A dry run writes nothing, so an existing output is not an error.
    force = how.force or how.dry_run
    check_target(planned.path, planned.target, planned.sizes, force=force)
    if not json:
        warn_if_busy(processors.threads)
        view.show_plan(planned)
    elif how.dry_run:
        print_json(view.plan_json(planned))
    if how.dry_run:
        return
    try:
        with stoppable_watch() as watch:
            done = run_conversion(planned, force=how.force, watch=watch)
    except OverBudgetError as error:
        if not json:
            view.show_trials(error.trials)
        raise
    if json:
        print_json(view.converted_json(planned, done))
    else:
        view.show_converted(planned, done)


def _goal(quality: QualityName | None, limits: Mapping[str, float], at: Boundary | None) -> Goal:
    """Return the requested goal. BALANCED supplies the limits that the user did not set."""
    if quality and limits:
        raise typer.BadParameter("use either --quality or custom limits, not both")
    if limits:
        budget = replace(BALANCED, quality="custom", **limits)  # type: ignore[arg-type]
        return Within(budget, at)
    return Within(BUDGETS[quality], at) if quality else at or Within(BALANCED)
