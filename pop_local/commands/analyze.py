"""`pop-local analyze MODEL`: measure which layers context tokens need."""

from dataclasses import dataclass
from pathlib import Path

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.console import note
from pop_local.ui.tables import print_json
from pop_local.ui.views.analysis import as_json, show
from pop_local.ui.watch import stoppable_watch

_N_GATED = 20


@dataclass(frozen=True)
class ProbeOptions(Group):
    text: Path | None = option("Text to measure on (default: built-in prose).", "FILE")
    context: int = option("Context tokens per window.", min=32, default=192)
    continuation: int = option("Answer tokens per window, after the context.", min=2, default=64)
    windows: int | None = option(f"Windows to train the gates on (default: {_N_GATED}).", min=2)
    probe_windows: int = option("Windows for the probes.", min=1, default=3)
    no_gates: bool = option("Run only the probes: faster, and without torch.", default=False)
    no_fit: bool = option("Measure only the layers' own projections (faster).", default=False)
    tokens: int | None = option("Tokens to fit on (default: a quarter of convert's).", min=1)
    plot: Path | None = option("Plot KL divergence against the speed-up limit.", "OUT.png")
    force: bool = option("Replace an existing plot file.", flag="--force -f", default=False)
    seed: int = option("Seed for choosing targets, passages and random tokens.", min=0, default=0)


@expand_options
def analyze(
    model: opt.Model,
    *,
    by: ProbeOptions,
    json: opt.Json = False,
    processors: opt.HardwareOptions,
) -> None:
    """Measure which layers prompts and answers need, and how many layers prompts can skip."""
    if by.no_fit and by.tokens is not None:
        raise typer.BadParameter("--tokens requires a fit; remove --tokens or --no-fit")
    if by.no_gates and by.windows is not None:
        raise typer.BadParameter("--windows requires gates; remove --windows or --no-gates")
    from pop_local.research import analysis_plot, layer_analysis
    from pop_local.research.analyze_options import AnalyzeOptions

    if by.plot is not None:
        analysis_plot.require_plot(by.plot, model, force=by.force)
    options = AnalyzeOptions(
        text=by.text,
        n_context=by.context,
        n_answer=by.continuation,
        n_probed=by.probe_windows,
        n_gated=0 if by.no_gates else by.windows or _N_GATED,
        with_fit=not by.no_fit,
        fit_tokens=by.tokens,
        seed=by.seed,
    )
    with stoppable_watch() as watch:
        found = layer_analysis.analyze(model, options, hardware=processors.hardware, watch=watch)
    if by.plot is not None:
        analysis_plot.plot_analysis(found, by.plot, force=by.force)
        note(f"The plot is in {by.plot}.")
    print_json(as_json(found)) if json else show(found)
