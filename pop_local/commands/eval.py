"""`pop-local eval MODEL`: what pruning costs in quality, measured against the full model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from pop_converter.fit.least_squares import RIDGE
from pop_local.calibration.options import FitOptions
from pop_local.commands import options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.tables import print_json
from pop_local.ui.views import quality as view
from pop_local.ui.watch import stoppable_watch

if TYPE_CHECKING:
    from pop_local.workflows.conversion.goals import Named


@dataclass(frozen=True)
class WindowOptions(Group):
    text: Path | None = option("Held-out text. Default: our own.", "FILE")
    context: int = option("Tokens to prune in each window.", min=2, default=512)
    continuation: int = option("Tokens to score after them.", min=2, default=128)
    windows: int = option("How many windows.", min=1, default=32)
    recall: str | None = option(
        "Tokens of documents to ask facts of; 0 for none. Default: 512.", "N,..."
    )
    documents: int | None = option("How many of each length. Default: 24.", min=2)
    seed: int = option("Of passages, random tokens and facts.", min=0, default=0)


@dataclass(frozen=True)
class AblationOptions(Group):
    panel: ClassVar[str] = "Ablations"

    select: str | None = option(opt.SELECT, "SHARE")
    refill: int = option("Rows to give their depth with each scored token.", min=0, default=0)
    no_boundary: bool = option("Prune the context's last token as well.", default=False)
    baseline: Literal["always-skip"] | None = option(
        "Compare with skipping the same layers for every token, answers too."
    )


@dataclass(frozen=True)
class EvalFitOptions(opt.FittingOptions):
    ridge: float | None = option(
        f"Pull of the fit toward the layers' own projections. Default: {RIDGE}.",
        min=0.0,
        callback=opt.finite,
    )
    fit_text: list[Path] | None = option(opt.FIT_TEXTS, "FILE|DIR")


@expand_options
def eval(  # noqa: A001
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF file, converted or not, or a name.")
    ],
    *,
    on: WindowOptions,
    at: opt.BoundaryOptions,
    sweep: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Several boundaries: 1/6,1/4,1/3,1/2.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the projections at each boundary before measuring.")
    ] = False,
    json: opt.Json = False,
    measured: opt.MeasureOptions,
    ablation: AblationOptions,
    fitting: EvalFitOptions,
) -> None:
    """Measure what pruning costs: KL and perplexity against the full model, copying, recall."""
    no_boundary = ablation.no_boundary
    if ablation.baseline is not None and no_boundary:
        raise typer.BadParameter("--baseline compares with POP: leave --no-boundary out")
    lengths = tuple(filter(None, opt.lengths(on.recall or "512", "--recall", least=0)))
    if no_boundary and (on.documents is not None or (on.recall is not None and lengths)):
        raise typer.BadParameter(
            "no facts are asked with --no-boundary: leave --recall and --documents out"
        )
    boundaries = _boundaries(at, sweep)
    texts = tuple(fitting.fit_text or ()) or None
    given = fitting.fit(texts=texts, ridge=fitting.ridge)
    if not fit:
        opt.no_fit(given, "there is no --fit")
    elif measured.sidecar is not None:
        raise typer.BadParameter("--fit makes projections of its own: leave --sidecar out")
    from pop_local.engine.llama.backend import Mode
    from pop_local.measure.quality import QualitySettings
    from pop_local.workflows.evaluate import EvaluateOptions, evaluate

    mode = Mode.ALWAYS if no_boundary else Mode.CONTEXT
    options = EvaluateOptions(
        text=on.text,
        settings=QualitySettings(on.windows, on.context, on.continuation, mode, on.seed),
        recall=lengths,
        n_documents=on.documents or EvaluateOptions.n_documents,
        select=opt.selected(ablation.select),
        n_refilled=ablation.refill,
        baseline=ablation.baseline,
        n_ctx=measured.n_ctx,
    )
    with stoppable_watch() as watch:
        found = evaluate(
            model,
            options,
            at=boundaries,
            fit=(given or FitOptions()) if fit else None,
            sidecar=measured.sidecar,
            hardware=measured.hardware,
            watch=watch,
        )
    if sweep is not None:
        print_json(view.sweep_json(found)) if json else view.show_sweep(found)
    else:
        print_json(view.evaluation_json(found)) if json else view.show_evaluation(found)


def _boundaries(at: opt.BoundaryOptions, sweep: str | None) -> "tuple[Named, ...]":
    """Return the boundaries that were given; none for the file's."""
    if sum(each is not None for each in (at.skip, at.boundary, sweep)) > 1:
        raise typer.BadParameter("--skip, --boundary and --sweep say the same: give one of them")
    if sweep is not None:
        return tuple(opt.share(part, "--sweep") for part in sweep.split(","))
    return () if at.named is None else (at.named,)
