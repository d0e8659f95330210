"""`pop-local analyze MODEL`: which layers context tokens can do without, and where copying ends."""

from pathlib import Path
from typing import Annotated

import typer

from pop_local.commands import options as opt
from pop_local.ui.tables import print_json
from pop_local.ui.theme import note
from pop_local.ui.views.analysis import as_json, show
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.options import Hardware

_N_GATED = 20


def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or a name.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure on. Default: our prose.")
    ] = None,
    context: Annotated[int, typer.Option(min=32, help="Context tokens in each window.")] = 192,
    continuation: Annotated[int, typer.Option(min=2, help="Answer tokens after them.")] = 64,
    windows: Annotated[
        int | None, typer.Option(min=2, help=f"Windows for the gates. Default: {_N_GATED}.")
    ] = None,
    probe_windows: Annotated[int, typer.Option(min=1, help="Windows for the probes.")] = 3,
    no_gates: Annotated[
        bool, typer.Option("--no-gates", help="Only the probes: no torch, less time.")
    ] = False,
    no_fit: Annotated[
        bool, typer.Option("--no-fit", help="Only the layers' own projections: less time.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="To fit on. Default: a quarter of convert's."),
    ] = None,
    plot_file: opt.Plot = None,
    force: opt.ReplacePlot = False,
    seed: Annotated[int, typer.Option(min=0, help="Of targets, passages, random tokens.")] = 0,
    json: opt.Json = False,
    threads: opt.Threads = None,
    gpu_layers: opt.GpuLayers = -1,
) -> None:
    """Measure which layers matter for reading and for answering, and how deep pruning may go."""
    if no_fit and tokens is not None:
        raise typer.BadParameter("--tokens are for the fit: leave it out, or --no-fit")
    if no_gates and windows is not None:
        raise typer.BadParameter("--windows are for the gates: leave it out, or --no-gates")
    from pop_local.research import plots

    if plot_file is not None:
        plots.require_plot(plot_file, model, force=force)
    from pop_local.research.analyze import analyze as analyze_model
    from pop_local.research.options import AnalyzeOptions

    options = AnalyzeOptions(
        text=text,
        n_context=context,
        n_answer=continuation,
        n_probed=probe_windows,
        n_gated=0 if no_gates else windows or _N_GATED,
        with_fit=not no_fit,
        fit_tokens=tokens,
        seed=seed,
    )
    with stoppable_watch() as watch:
        found = analyze_model(model, options, hardware=Hardware(threads, gpu_layers), watch=watch)
    if plot_file is not None:
        plots.plot_analysis(found, plot_file, force=force)
        note(f"Drawn: {plot_file}")
    print_json(as_json(found)) if json else show(found)
