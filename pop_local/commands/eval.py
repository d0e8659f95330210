"""`pop-local eval MODEL`: what pruning costs in quality, measured against the full model."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pop_converter.errors import PopError
from pop_converter.format import FITTED, OWN
from pop_converter.header import read_header
from pop_converter.output import check_output
from pop_converter.plan import make_plan, parse_skip
from pop_converter.rewrite import stored_type
from pop_converter.shape import ModelShape, source_shape
from pop_converter.sidecar import pop_of
from pop_converter.source import Source, read_source

from pop_local.commands.converting import fitted_sidecars
from pop_local.commands.fitting import (
    FitOptions,
    KvTypeOption,
    Memory,
    Ridge,
    Tokens,
    WeightingOption,
)
from pop_local.commands.options import Ctx, GpuLayers, NoPop, Pop, Threads
from pop_local.commands.ready import files_at_depth, model_files
from pop_local.measure.limit import speedup_limit
from pop_local.ui.progress import token_progress
from pop_local.ui.quality import ALWAYS_SKIP, Row, facts, flat, plot, require_matplotlib, table
from pop_local.ui.tables import markdown, print_facts, print_json
from pop_local.ui.theme import note, out

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.heldout import Text
    from pop_local.measure.needle import Needle
    from pop_local.measure.quality import QualitySettings

# As for convert's limit: the full rows hardly count.
LIMIT_PROMPT = 2048


class Baseline(str, Enum):
    ALWAYS_SKIP = ALWAYS_SKIP


@dataclass(frozen=True)
class Run:
    """What is measured, and with what; `n_needles` 0 for none."""

    text: "Text"
    settings: "QualitySettings"
    n_needles: int
    sink: int | None
    tail: int | None
    ctx: int | None
    threads: int | None
    gpu_layers: int
    baseline: Baseline | None = None
    sidecar: Path | None = None


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
    ctx: Ctx = None,
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
    files = files_at_depth(model, pop) if own_depth else model_files(model, pop)
    source = read_source(files.path)
    shape = source_shape(source)
    boundaries = _boundaries(source, shape, skip, boundary, sweep, files.sidecar)
    if plot_file is not None:
        require_matplotlib()
        check_output(plot_file, (source.first.path,), 0, force=force)
    from pop_local.engine.backend import Mode
    from pop_local.measure.heldout import read_text, shipped_text
    from pop_local.measure.quality import QualitySettings

    mode = Mode.ALWAYS if no_boundary else Mode.OFF if no_pop else Mode.CONTEXT
    run = Run(
        text=shipped_text() if text is None else read_text(text),
        settings=QualitySettings(windows, context, continuation, mode, seed),
        # Generated tokens would be pruned as well, or nothing would be.
        n_needles=needles if mode is Mode.CONTEXT else 0,
        sink=sink,
        tail=tail,
        ctx=ctx,
        threads=threads,
        gpu_layers=gpu_layers,
        baseline=baseline,
        sidecar=files.sidecar,
    )
    if fit:
        rows = _fitted(source, shape, boundaries, options, run)
    else:
        rows = _rows(source, shape, boundaries, run)
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
        plans = [make_plan(shape, skip=parse_skip(part)) for part in sweep.split(",")]
        return tuple(dict.fromkeys(plan.boundary for plan in plans))
    if boundary is not None:
        return (make_plan(shape, boundary=boundary).boundary,)
    if skip is not None:
        return (make_plan(shape, skip=parse_skip(skip)).boundary,)
    meta = pop_of(source, sidecar)
    if meta is None:
        path = source.first.path
        raise PopError(
            f"{path} is not converted: there is nothing to measure",
            f"convert it (pop-local convert {path}), or choose --skip, --boundary or --sweep",
        )
    return (meta.boundary,)


def _fitted(
    source: Source,
    shape: ModelShape,
    boundaries: Sequence[int],
    options: FitOptions,
    run: Run,
) -> tuple[Row, ...]:
    """Fit at all depths in one go, then measure a temporary sidecar of each."""
    plans = [make_plan(shape, boundary=depth, projection=FITTED) for depth in boundaries]
    sidecars = fitted_sidecars(
        plans, source, options, n_threads=run.threads, n_gpu_layers=run.gpu_layers
    )
    with closing(sidecars):
        return tuple(
            row
            for depth, sidecar in zip(boundaries, sidecars, strict=True)
            for row in _rows(source, shape, (depth,), replace(run, sidecar=sidecar))
        )


def _rows(
    source: Source, shape: ModelShape, boundaries: Sequence[int], run: Run
) -> tuple[Row, ...]:
    """Measure the depths on one loaded model."""
    from pop_local.measure.forced import Pruning, always_skip
    from pop_local.measure.heldout import tokenize
    from pop_local.measure.quality import measure_prunings

    prunings = [Pruning(boundary, run.settings.mode) for boundary in boundaries]
    if run.baseline is not None:
        prunings += [always_skip(boundary) for boundary in boundaries]
    opened = _opened(source, run)
    try:
        tokens = tokenize(opened, run.text)
        with token_progress("Measuring") as advance:
            qualities = measure_prunings(opened, tokens, run.settings, prunings, advance)
        needles = _needles(opened, boundaries, run)
        n_full = opened.rule.sink_tokens + opened.rule.tail_tokens
    finally:
        opened.close()
    meta = pop_of(source, run.sidecar)
    n = len(boundaries)
    baselines = qualities[n:] or (None,) * n
    calibration = None if meta is None else meta.calibration
    tensors = source.tensors if run.sidecar is None else read_header(run.sidecar).tensors
    return tuple(
        Row(
            n_skipped=shape.n_layer - quality.boundary,
            projection=FITTED if calibration is not None else OWN,
            calibration=calibration,
            kv_type=stored_type(tensors),
            speedup_limit=speedup_limit(shape, LIMIT_PROMPT, quality.boundary, n_full),
            quality=quality,
            needle=needle,
            always_skip=baseline,
        )
        for quality, needle, baseline in zip(qualities[:n], needles, baselines, strict=True)
    )


def _opened(source: Source, run: Run) -> "PopModel":
    from pop_local.engine.model import open_model
    from pop_local.measure.forced import use_rule

    opened = open_model(
        source.first.path,
        sidecar=run.sidecar,
        n_ctx=_context(source, run),
        n_threads=run.threads,
        n_gpu_layers=run.gpu_layers,
    )
    rule = opened.rule
    sink = rule.sink_tokens if run.sink is None else run.sink
    tail = rule.tail_tokens if run.tail is None else run.tail
    use_rule(opened, replace(rule, sink_tokens=sink, tail_tokens=tail))
    return opened


def _context(source: Source, run: Run) -> int:
    from pop_local.measure.needle import context_tokens
    from pop_local.measure.probes import N_REPEATED

    windows = run.settings.n_context + run.settings.n_continuation
    needed = max(windows, 2 * N_REPEATED + 1, context_tokens() if run.n_needles else 0)
    trained = source.first.get(f"{source.first.get('general.architecture')}.context_length")
    limit, whose = (trained, "the model has") if run.ctx is None else (run.ctx, "--ctx gives")
    if isinstance(limit, int) and limit < needed:
        raise PopError(
            f"{needed} tokens of context are needed, {whose} {limit}",
            "give shorter windows (--context, --continuation), perhaps without --needles",
        )
    return run.ctx or needed


def _needles(opened: "PopModel", boundaries: Sequence[int], run: Run) -> "Sequence[Needle | None]":
    if run.n_needles == 0:
        return (None,) * len(boundaries)
    from pop_local.measure.needle import measure_needle

    with token_progress("Asking") as advance:
        return measure_needle(opened, boundaries, run.n_needles, run.settings.seed, advance)


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
        out.file.write("\n".join(lines) + "\n")
    else:
        print_facts([("Model", path), ("Text", text.name), *facts(rows[0])])
