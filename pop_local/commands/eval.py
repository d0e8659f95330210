"""`pop-local eval MODEL`: what pruning costs in quality, measured against the full model."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from pop_converter.fit.least_squares import RIDGE, Weighting
from pop_local.calibration.options import FitOptions
from pop_local.commands import options as opt
from pop_local.commands.unfolding import Group, unfolded
from pop_local.ui.tables import print_json
from pop_local.ui.theme import note
from pop_local.ui.views import quality as view
from pop_local.ui.views.plots import plot_sweep, require_plot
from pop_local.ui.watch import stoppable_watch

if TYPE_CHECKING:
    from pop_local.workflows.conversion.goals import Named


class BaselineName(str, Enum):
    """What pruning is compared with."""

    ALWAYS_SKIP = view.ALWAYS_SKIP


@dataclass(frozen=True)
class AblationOptions(Group):
    """Other ways to prune, and what to compare with."""

    panel: ClassVar[str] = "Ablations and yardsticks"

    select: opt.Select = None
    refill: Annotated[
        int,
        typer.Option(min=0, help="Rows to give their depth with each scored token."),
    ] = 0
    sink: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens in full, whatever the file says."),
    ] = None
    tail: Annotated[
        int | None,
        typer.Option(min=0, help="Last context tokens in full, likewise."),
    ] = None
    no_boundary: Annotated[
        bool,
        typer.Option("--no-boundary", help="Prune the context's last token as well."),
    ] = False
    second_turn: Annotated[
        bool,
        typer.Option("--second-turn", help="Also the answer after that, refilled or not."),
    ] = False
    baseline: Annotated[
        BaselineName | None,
        typer.Option(help="Compare with skipping the same layers for every token, answers too."),
    ] = None
    yardstick: Annotated[
        bool,
        typer.Option("--yardstick", help="Also measure the model quantised as Q4_0, Q3_K_M, Q2_K."),
    ] = False


@dataclass(frozen=True)
class EvalFitOptions(opt.FittingOptions):
    """How projections are fitted."""

    ridge: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            callback=opt.finite,
            help=f"Pull of the fit toward the layers' own projections. Default: {RIDGE}.",
        ),
    ] = None
    weighting: Annotated[
        Weighting | None,
        typer.Option(
            help="Whether tokens count by the attention that they get. Default: attention."
        ),
    ] = None
    fit_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="Text to fit on. Default: convert's."),
    ] = None


@unfolded
def eval(  # noqa: A001
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF file, converted or not, or a name.")
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out text. Default: our own.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens to prune in each window.")] = 512,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens to score after them.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 32,
    recall: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Tokens of documents to ask facts of; 0 for none. Default: 512."
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=2, help="How many of each length. Default: 24.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of passages, random tokens and facts.")] = 0,
    skip: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Layers to skip: 1/3, 0.33, or a number.")
    ] = None,
    boundary: opt.BoundaryLayer = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Several boundaries: 1/6,1/4,1/3,1/2.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the projections at each boundary before measuring.")
    ] = False,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw the boundaries of --sweep."),
    ] = None,
    force: opt.ReplacePlot = False,
    json: opt.Json = False,
    *,
    measured: opt.MeasureOptions,
    ablation: AblationOptions,
    fitting: EvalFitOptions,
) -> None:
    """Measure what pruning costs: KL and perplexity against the full model, copying, recall."""
    no_boundary = ablation.no_boundary
    if plot_file is not None and sweep is None:
        raise typer.BadParameter("--plot draws the boundaries of a --sweep")
    if ablation.baseline is not None and no_boundary:
        raise typer.BadParameter("--baseline compares with POP: leave --no-boundary out")
    lengths = tuple(filter(None, opt.lengths(recall or "512", "--recall", least=0)))
    if no_boundary and (documents is not None or (recall is not None and lengths)):
        raise typer.BadParameter(
            "no facts are asked with --no-boundary: leave --recall and --documents out"
        )
    at = _boundaries(skip, boundary, sweep)
    given = fitting.fit(text=fitting.fit_text, ridge=fitting.ridge, weighting=fitting.weighting)
    if not fit:
        opt.no_fit(given, "there is no --fit")
    elif measured.sidecar is not None:
        raise typer.BadParameter("--fit makes projections of its own: leave --sidecar out")
    if plot_file is not None:
        require_plot(plot_file, model, force=force)
    from pop_local.engine.llama.backend import Mode
    from pop_local.measure.quality import QualitySettings
    from pop_local.workflows.evaluate import EvaluateOptions, evaluate

    mode = Mode.ALWAYS if no_boundary else Mode.CONTEXT
    options = EvaluateOptions(
        text=text,
        settings=QualitySettings(windows, context, continuation, mode, seed),
        recall=lengths,
        n_documents=documents or EvaluateOptions.n_documents,
        select=opt.selected(ablation.select),
        n_refilled=ablation.refill,
        second_turn=ablation.second_turn,
        baseline=None if ablation.baseline is None else "always-skip",
        yardstick=ablation.yardstick,
        sink_tokens=ablation.sink,
        tail_tokens=ablation.tail,
        n_ctx=measured.n_ctx,
    )
    with stoppable_watch() as watch:
        found = evaluate(
            model,
            options,
            at=at,
            fit=(given or FitOptions()) if fit else None,
            sidecar=measured.sidecar,
            hardware=measured.hardware,
            watch=watch,
        )
    if plot_file is not None:
        plot_sweep(found.rows, plot_file, force=force)
        note(f"Drawn: {plot_file}")
    if sweep is not None:
        print_json(view.sweep_json(found)) if json else view.show_sweep(found)
    else:
        print_json(view.evaluation_json(found)) if json else view.show_evaluation(found)


def _boundaries(skip: str | None, boundary: int | None, sweep: str | None) -> "tuple[Named, ...]":
    """Return the boundaries that were given; none for the file's."""
    if sum(option is not None for option in (skip, boundary, sweep)) > 1:
        raise typer.BadParameter("--skip, --boundary and --sweep say the same: give one of them")
    if sweep is not None:
        return tuple(opt.share(part, "--sweep") for part in sweep.split(","))
    named = opt.named_boundary(skip, boundary)
    return () if named is None else (named,)
