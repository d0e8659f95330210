"""`pop-local convert IN.gguf [OUT.gguf]`: write the model with its pruning schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.pruning_plan import TAIL_TOKENS
from pop_converter.popfile.rewrite import check_target
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.measure.budget import BALANCED, BUDGETS
from pop_local.models.sidecars import is_shipped, sidecar_of
from pop_local.ui.tables import print_json
from pop_local.ui.theme import note
from pop_local.ui.views import conversion as view
from pop_local.ui.views.trials import show_trials
from pop_local.ui.watch import stoppable_watch, terminal_watch
from pop_local.workflows.conversion.convert import run_conversion
from pop_local.workflows.conversion.goals import Goal, Named, Within
from pop_local.workflows.conversion.plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.refusals import OverBudgetError
from pop_local.workflows.conversion.row_options import RowOptions
from pop_local.workflows.open import base_file

QualityName = Literal["near-lossless", "balanced", "fast"]


@dataclass(frozen=True)
class HowOptions(Group):
    quality: QualityName | None = option(
        f"What may be lost. Default: {BALANCED.quality}, or anything with --skip or --boundary.",
    )
    projection: Projection | None = option(
        "K/V of skipped layers: own (no fit, loses more quality), fitted to the model (takes"
        " minutes) or fitted-wide (with more inputs). Default: what measures best for its cost.",
    )
    text: list[Path] | None = option(opt.FIT_TEXTS, "FILE|DIR")
    distill: bool = option(
        "Train the fit end to end, too: it copies better. This takes minutes for each boundary that"
        " is tried. Needs torch; for dense models of llama, qwen2, qwen3, gemma2 and gemma3.",
        default=False,
    )
    resume: bool = option(
        "Keep the fit when it is stopped, and go on with a kept one.", default=False
    )
    sidecar: bool = option(
        "Write only what is new, into a small file beside the model.", default=False
    )
    dry_run: bool = option("Print the plan and write nothing.", default=False)
    force: bool = option(
        "Replace an existing output. With --skip or --boundary and no --quality or limit: write a"
        " fit, too, that can no longer copy from its prompt.",
        flag="--force -f",
        default=False,
    )


def _limit(unit: str, words: str) -> Any:
    return option(words, unit, min=0.0, callback=opt.positive)


@dataclass(frozen=True)
class LimitOptions(Group):
    panel: ClassVar[str] = "Limits of your own"

    max_kl: float | None = _limit("NATS", "KL divergence from the full model.")
    max_ppl_ratio: float | None = _limit("RATIO", "Perplexity, in the full model's.")
    max_copy_ratio: float | None = _limit(
        "RATIO", "Perplexity of a repeated passage, in the full model's."
    )


@dataclass(frozen=True)
class FullRowOptions(Group):
    panel: ClassVar[str] = "Tokens in full"

    sink: int = option("First tokens of a prompt.", min=0, default=PopMeta.sink_tokens)
    tail: int = option("Last tokens of a prompt.", min=0, default=TAIL_TOKENS)
    min_prompt: int | None = option(
        "Shorter prompts run in full. Default: those that save less than half of what long ones"
        " save, about 70.",
        min=0,
    )

    @property
    def rows(self) -> RowOptions:
        return RowOptions(self.sink, self.tail, self.min_prompt)


@dataclass(frozen=True)
class ConvertFitOptions(opt.FittingOptions):
    mmproj: Path | None = option("Fit on pictures, too, as this mmproj shows them.", "FILE")
    images: Path | None = option("Pictures to fit on, with --mmproj. Default: drawn ones.", "DIR")
    distill_tokens: int | None = option(
        "Tokens of text for --distill: more are better, and take as many times the time. Default:"
        " as many as are fitted on, 65536 at least.",
        min=1,
    )


@expand_options
def convert(
    model: Annotated[str, typer.Argument(metavar="IN.gguf", help="A model, or its first part.")],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.gguf", help="Default: IN.pop.gguf beside it."),
    ] = None,
    *,
    out: opt.Output = None,
    at: opt.BoundaryOptions,
    how: HowOptions,
    json: opt.Json = False,
    limits: LimitOptions,
    full: FullRowOptions,
    fitting: ConvertFitOptions,
    processors: opt.ProcessorOptions,
) -> None:
    """Make a copy of a model that reads long prompts faster.

    As many layers are skipped as --quality allows. Three qualities limit the perplexity of
    held-out text and of a repeated passage: near-lossless at 1.01 and 1.02 times the full model's,
    balanced at 1.03 and 1.1 times, fast at 1.06 and 1.3 times. --dry-run names all limits. --skip
    and --boundary name the layers themselves.

    The weights stay as they are. The K/V projections of the skipped layers are fitted to the model
    and added, so only pop-local opens the copy. The loss of quality is measured, printed and
    stored. With --projection own nothing is added, and stock llama.cpp opens the copy too, in full.
    With --sidecar the model itself stays the file to open.
    """
    output = opt.one_output(output, out)
    named, own = at.named, opt.given(**vars(limits))
    if fitting.images is not None and fitting.mmproj is None:
        raise typer.BadParameter("--images goes with --mmproj", param_hint="--images")
    if fitting.distill_tokens is not None and not how.distill:
        raise typer.BadParameter("it goes with --distill", param_hint="--distill-tokens")
    others = {"mmproj": fitting.mmproj, "images": fitting.images}
    texts = tuple(how.text or ()) or None
    fit = fitting.fit(texts=texts, distill_tokens=fitting.distill_tokens, **others)
    if how.projection is Projection.OWN:
        opt.no_fit(fit, "--projection own fits nothing")
        if how.resume or how.distill:
            raise typer.BadParameter("--projection own fits nothing: leave --resume, --distill out")
    fit = replace(fit or FitOptions(), projection=how.projection)
    distiller = None
    if how.distill:
        from pop_local.research.distilled import Distiller

        distiller = Distiller
    options = ConvertOptions(
        goal=_wanted(how.quality, own, named),
        fit=None if how.projection is Projection.OWN else fit,
        rows=full.rows,
        output="sidecar" if how.sidecar else "copy",
        resume=how.resume,
        distiller=distiller,
        hardware=processors.hardware,
    )
    with terminal_watch() as watch:
        base = base_file(model, watch)
    planned = plan_conversion(base, output, options)
    if (found := sidecar_of(planned.source)) and is_shipped(found):
        note(f"{found.name} comes with pop-local: it is used without a conversion.")
    if not json:
        view.show_plan(planned)
    elif how.dry_run:
        print_json(view.plan_json(planned))
    if how.dry_run:
        # But for what --force would replace.
        check_target(planned.path, planned.target, planned.sizes, force=True)
        return
    try:
        with stoppable_watch() as watch:
            done = run_conversion(planned, force=how.force, watch=watch)
    except OverBudgetError as error:
        if not json:
            show_trials(error.trials)
        raise
    if json:
        print_json(view.converted_json(planned, done))
    else:
        view.show_converted(planned, done)


def _wanted(quality: QualityName | None, limits: Mapping[str, float], named: Named | None) -> Goal:
    """Return the requested goal. Missing limits default to BALANCED."""
    if quality and limits:
        raise typer.BadParameter("give --quality, or limits of your own, not both")
    if quality:
        return Within(BUDGETS[quality], named)
    if limits:
        budget = replace(BALANCED, quality="custom", **limits)  # type: ignore[arg-type]
        return Within(budget, named)
    return named or Within(BALANCED)
