"""`pop-local eval MODEL`: what pruning costs in quality, measured against the full model."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pop_local.calibration.options import FitOptions
from pop_local.commands import options as opt
from pop_local.ui.tables import print_json
from pop_local.ui.views import quality as view
from pop_local.ui.views.prompts import comparison_json, show_comparison
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.options import Boundary, Skip


class BaselineName(str, Enum):
    """What pruning is compared with."""

    ALWAYS_SKIP = view.ALWAYS_SKIP


_OF_PROMPTS = {"answers", "longest", "mmproj"}
_OF_BOTH = {"model", "prompts", "pop", "json", "threads", "n_ctx", "gpu_layers", "rpc"}


def eval(  # noqa: A001
    call: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF file, converted or not, or a name.")
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out text. Default: our own.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens to prune in each window.")] = 512,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens to score after them.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 32,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Your own prompts, answered in full and pruned, instead of all else: a line is"
            ' {"prompt": ...} or {"messages": [...]}, perhaps with "documents" and "answer".',
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps answers to --prompts; goes on where they end."),
    ] = None,
    # It must not be called max_tokens: the setting of that name is for conversations.
    longest: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer to --prompts.")
    ] = 256,
    skip: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Layers to skip: 1/3, 0.33, or a number.")
    ] = None,
    boundary: opt.BoundaryLayer = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Several depths: 1/6,1/4,1/3,1/2.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the projections at each depth before measuring.")
    ] = False,
    baseline: Annotated[
        BaselineName | None,
        typer.Option(help="Compare with skipping the same layers for every token, answers too."),
    ] = None,
    yardstick: Annotated[
        bool,
        typer.Option("--yardstick", help="Also measure the model quantised as Q4_0, Q3_K_M, Q2_K."),
    ] = False,
    fit_text: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Text to fit on. Default: convert's.")
    ] = None,
    tokens: opt.Tokens = None,
    kv_type: opt.KvTypeOption = None,
    ridge: opt.Ridge = None,
    weighting: opt.WeightingOption = None,
    memory: opt.Memory = None,
    no_boundary: Annotated[
        bool, typer.Option("--no-boundary", help="Prune the context's last token as well.")
    ] = False,
    pop: opt.Pop = None,
    no_pop: opt.NoPop = False,
    sink: Annotated[
        int | None, typer.Option(min=0, help="First tokens in full, whatever the file says.")
    ] = None,
    tail: Annotated[
        int | None, typer.Option(min=0, help="Last context tokens in full, likewise.")
    ] = None,
    select: opt.Select = None,
    refill: Annotated[
        int, typer.Option(min=0, help="Rows to give their depth with each scored token.")
    ] = 0,
    recall: Annotated[
        str,
        typer.Option(metavar="N,...", help="Tokens of documents to ask facts of; 0 for none."),
    ] = "512",
    second_turn: Annotated[
        bool, typer.Option("--second-turn", help="Also the answer after that, refilled or not.")
    ] = False,
    documents: Annotated[int, typer.Option(min=2, help="How many of each length.")] = 24,
    mmproj: opt.Mmproj = None,
    seed: Annotated[int, typer.Option(min=0, help="Of passages, random tokens and facts.")] = 0,
    json: opt.Json = False,
    threads: opt.Threads = None,
    n_ctx: opt.MeasuredCtx = None,
    gpu_layers: opt.GpuLayers = -1,
    rpc: opt.Rpc = None,
) -> None:
    """Measure what pruning costs: KL and perplexity against the full model, copying, recall.

    With --prompts it compares answers instead, to prompts of your own.
    """
    _require_one_kind(call, prompts)
    if prompts is not None:
        from pop_local.workflows.prompts import PromptOptions, evaluate_prompts

        with stoppable_watch() as watch:
            compared = evaluate_prompts(
                model,
                prompts,
                PromptOptions(longest, n_ctx, answers, mmproj),
                sidecar=pop,
                hardware=opt.hardware(threads, gpu_layers, rpc),
                watch=watch,
            )
        print_json(comparison_json(compared)) if json else show_comparison(compared)
        return
    if no_boundary and no_pop:
        raise typer.BadParameter("--no-boundary prunes all, --no-pop nothing: give one of them")
    if second_turn and (sweep is not None or fit):
        raise typer.BadParameter("--second-turn is of one depth, as it is: no --sweep, no --fit")
    if baseline is not None and (no_boundary or no_pop):
        raise typer.BadParameter("--baseline compares with POP: leave --no-boundary, --no-pop out")
    lengths = tuple(filter(None, opt.lengths(recall, "--recall", least=0)))
    of_facts = opt.given_names(call) & {"documents", "recall" if lengths else ""}
    if (no_boundary or no_pop) and of_facts:
        raise typer.BadParameter(
            f"no facts are asked with --no-pop or --no-boundary: leave --{min(of_facts)} out"
        )
    depths = _depths(skip, boundary, sweep)
    given = opt.given_fit(
        memory, tokens=tokens, text=fit_text, kv_type=kv_type, ridge=ridge, weighting=weighting
    )
    if not fit:
        opt.no_fit(given, "there is no --fit")
    elif pop is not None:
        raise typer.BadParameter("--fit makes projections of its own: leave --pop out")
    from pop_local.engine.llama.backend import Mode
    from pop_local.measure.quality import QualitySettings
    from pop_local.research.turns import second_turn as measure_second_turn
    from pop_local.research.yardstick import quantised
    from pop_local.workflows.evaluate import EvaluateOptions, begin

    mode = Mode.ALWAYS if no_boundary else Mode.OFF if no_pop else Mode.CONTEXT
    options = EvaluateOptions(
        text=text,
        settings=QualitySettings(windows, context, continuation, mode, seed),
        recall=lengths,
        n_documents=documents,
        select=opt.selected(select),
        n_refilled=refill,
        baseline=None if baseline is None else "always-skip",
        sink_tokens=sink,
        tail_tokens=tail,
        n_ctx=n_ctx,
    )
    with stoppable_watch() as watch:
        how = (given or FitOptions()) if fit else None
        hardware = opt.hardware(threads, gpu_layers, rpc)
        run = begin(model, options, depths, how, pop, hardware, watch)
        second = measure_second_turn(run) if second_turn else None
        found = run.evaluation()
        beside = view.Beside(second, tuple(quantised(run)) if yardstick else ())
    if sweep is not None:
        print_json(view.sweep_json(found, beside)) if json else view.show_sweep(found, beside)
    else:
        print_json(view.evaluation_json(found, beside)) if json else view.show_evaluation(
            found, beside
        )


def _require_one_kind(call: typer.Context, prompts: Path | None) -> None:
    """Wrong usage if options were given that are of no effect with --prompts, or without."""
    names = opt.given_names(call) - _OF_BOTH
    for option in call.command.params:
        if option.name in names and (option.name in _OF_PROMPTS) != (prompts is not None):
            of = "is of no effect with --prompts" if prompts else "belongs to --prompts"
            raise typer.BadParameter(f"{option.opts[0]} {of}")


def _depths(
    skip: str | None, boundary: int | None, sweep: str | None
) -> tuple[Skip | Boundary, ...]:
    """As given; none for the file's."""
    if sum(option is not None for option in (skip, boundary, sweep)) > 1:
        raise typer.BadParameter("--skip, --boundary and --sweep say the same: give one of them")
    if sweep is not None:
        return tuple(opt.share(part, "--sweep") for part in sweep.split(","))
    named = opt.named_depth(skip, boundary)
    return () if named is None else (named,)
