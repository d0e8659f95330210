"""`pop-local eval MODEL`: what pruning costs in quality, measured against the full model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from converter.errors import PopError
from converter.format import FITTED
from converter.output import check_output
from converter.plan import make_plan
from converter.shape import ModelShape, source_shape
from converter.sidecar import pop_of
from converter.source import Source, read_source
from pop_local.commands.evaluating import Baseline, Run, fitted_rows, rows_at
from pop_local.commands.fitting import (
    FitOptions,
    KvTypeOption,
    Memory,
    Ridge,
    Tokens,
    WeightingOption,
)
from pop_local.commands.options import GpuLayers, MeasuredCtx, NoPop, Pop, Threads, share
from pop_local.commands.ready import files_at_depth, model_files
from pop_local.ui.tables import markdown, print_facts, print_json
from pop_local.ui.theme import note, say
from pop_local.ui.views.quality import Row, facts, flat, plot, require_matplotlib, table


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
    skip: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Layers to skip: 1/3, 0.33, or a number.")
    ] = None,
    boundary: Annotated[
        int | None,
        typer.Option(metavar="LAYER", help="The first layer to skip, instead of --skip."),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Several depths: 1/6,1/4,1/3,1/2.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the projections at each depth before measuring.")
    ] = False,
    baseline: Annotated[
        Baseline | None,
        typer.Option(help="Compare with skipping the same layers for every token, answers too."),
    ] = None,
    fit_text: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Text to fit on. Default: convert's.")
    ] = None,
    tokens: Tokens = None,
    kv_type: KvTypeOption = None,
    ridge: Ridge = None,
    weighting: WeightingOption = None,
    memory: Memory = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw the depths of --sweep."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing plot.")] = False,
    no_boundary: Annotated[
        bool, typer.Option("--no-boundary", help="Prune the context's last token as well.")
    ] = False,
    pop: Pop = None,
    no_pop: NoPop = False,
    sink: Annotated[
        int | None, typer.Option(min=0, help="First tokens in full, whatever the file says.")
    ] = None,
    tail: Annotated[
        int | None, typer.Option(min=0, help="Last context tokens in full, likewise.")
    ] = None,
    needles: Annotated[
        int, typer.Option("--needles", min=0, help="Facts to hide in a long document.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of passages, random tokens and facts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Threads = None,
    n_ctx: MeasuredCtx = None,
    gpu_layers: GpuLayers = -1,
) -> None:
    """Measure what pruning costs: KL and perplexity against the full model, copying, recall."""
    _check_usage(no_boundary=no_boundary, no_pop=no_pop, plot_file=plot_file, sweep=sweep)
    if baseline is not None and (no_boundary or no_pop):
        raise typer.BadParameter("--baseline compares with POP: leave --no-boundary, --no-pop out")
    options = FitOptions(tokens, fit_text, kv_type, ridge, weighting, memory)
    if not fit:
        options.require_none("there is no --fit")
    elif pop is not None:
        raise typer.BadParameter("--fit makes projections of its own: leave --pop out")
    own_depth = fit or (skip, boundary, sweep) != (None, None, None)
    if own_depth:
        files = files_at_depth(model, pop)
    else:
        files = model_files(model, pop, threads=threads, gpu_layers=gpu_layers)
    source = read_source(files.path)
    shape = source_shape(source)
    boundaries = _boundaries(source, shape, skip, boundary, sweep, files.sidecar)
    options.require_text(shape.n_embd)
    if plot_file is not None:
        require_matplotlib()
        check_output(plot_file, (source.first.path,), 0, force=force)
    from pop_local.engine.llama.backend import Mode
    from pop_local.measure.heldout import given_text, shipped_text
    from pop_local.measure.quality import QualitySettings

    mode = Mode.ALWAYS if no_boundary else Mode.OFF if no_pop else Mode.CONTEXT
    run = Run(
        text=shipped_text() if text is None else given_text(text),
        settings=QualitySettings(windows, context, continuation, mode, seed),
        # Generated tokens would be pruned as well, or nothing would be.
        n_needles=needles if mode is Mode.CONTEXT else 0,
        sink=sink,
        tail=tail,
        ctx=n_ctx,
        threads=threads,
        gpu_layers=gpu_layers,
        baseline=baseline,
        sidecar=files.sidecar,
    )
    if fit:
        rows = fitted_rows(source, shape, boundaries, options, run)
    else:
        _require_projections(source, files.sidecar, boundaries)
        rows = rows_at(source, shape, boundaries, run)
    if plot_file is not None:
        plot(rows, plot_file, force=force)
        note(f"Drawn: {plot_file}")
    _show(source, run, rows, as_sweep=sweep is not None, json=json)


def _check_usage(
    *, no_boundary: bool, no_pop: bool, plot_file: Path | None, sweep: str | None
) -> None:
    if no_boundary and no_pop:
        raise typer.BadParameter("--no-boundary prunes all, --no-pop nothing: give one of them")
    if plot_file is not None and sweep is None:
        raise typer.BadParameter("--plot draws the depths of a --sweep")


def _boundaries(
    source: Source,
    shape: ModelShape,
    skip: str | None,
    boundary: int | None,
    sweep: str | None,
    sidecar: Path | None,
) -> tuple[int, ...]:
    """Of each depth to measure, as given, else the file's."""
    if sum(option is not None for option in (skip, boundary, sweep)) > 1:
        raise typer.BadParameter("--skip, --boundary and --sweep say the same: give one of them")
    if sweep is not None:
        plans = [make_plan(shape, skip=share(part, "--sweep")) for part in sweep.split(",")]
        return tuple(dict.fromkeys(plan.boundary for plan in plans))
    if boundary is not None:
        return (make_plan(shape, boundary=boundary).boundary,)
    if skip is not None:
        return (make_plan(shape, skip=share(skip, "--skip")).boundary,)
    meta = pop_of(source, sidecar)
    if meta is None:
        path = source.first.path
        raise PopError(
            f"{path} is not converted: there is nothing to measure",
            f"convert it (pop-local convert {path}), or choose --skip, --boundary or --sweep",
        )
    return (meta.boundary,)


def _require_projections(source: Source, sidecar: Path | None, boundaries: Sequence[int]) -> None:
    """Raises PopError where there are none at one of the depths."""
    meta = pop_of(source, sidecar)
    if meta is not None and meta.projection == FITTED and set(boundaries) != {meta.boundary}:
        raise PopError(
            f"{sidecar or source.first.path} has projections for boundary {meta.boundary} only",
            f"measure other depths on the model itself, {meta.source_name}, with --fit or without",
        )


def _show(source: Source, run: Run, rows: Sequence[Row], *, as_sweep: bool, json: bool) -> None:
    path, text = str(source.first.path), run.text
    if json:
        head = {"model": path, "text": {"name": text.name, "sha256": text.sha256}}
        figures = [flat(row) for row in rows]
        print_json(head | ({"rows": figures} if as_sweep else figures[0]))
    elif as_sweep or run.baseline is not None:
        q = rows[0].quality
        lines = [
            f"{path}: {q.n_windows} windows of {q.n_context} + {q.n_continuation} tokens",
            f"{text.name}; ± one standard error",
            "",
            markdown(table(rows)),
        ]
        say("\n".join(lines))
    else:
        print_facts([("Model", path), ("Text", text.name), *facts(rows[0])])
