"""`pop-local analyze MODEL`: measure which layers context tokens need."""

from dataclasses import dataclass
from pathlib import Path

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.console import note
from pop_local.ui.tables import print_json
from pop_local.ui.views.analysis import as_json, show
from pop_local.ui.watch import stoppable_watch


@dataclass(frozen=True)
class ProbeOptions(Group):
    text: Path | None = option("Text to measure on (default: built-in prose).", "FILE")
    context: int = option("Context tokens per window.", min=32, default=192)
    continuation: int = option("Answer tokens per window, after the context.", min=2, default=64)
    windows: int = option("Number of windows used to compute the gates.", min=2, default=20)
    tokens: int | None = option("Tokens to fit on (default: 1/4 of convert's default).", min=1)
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
    from pop_local.research import analysis_plot, layer_analysis

    if by.plot is not None:
        analysis_plot.require_plot(by.plot, model, force=by.force)
    options = layer_analysis.AnalyzeOptions(
        text=by.text,
        n_context=by.context,
        n_answer=by.continuation,
        n_gated=by.windows,
        fit_tokens=by.tokens,
        seed=by.seed,
    )
    with stoppable_watch() as watch:
        found = layer_analysis.analyze(model, options, hardware=processors.hardware, watch=watch)
    if by.plot is not None:
        analysis_plot.plot_analysis(found, by.plot, force=by.force)
        note(f"Saved the plot as {by.plot}.")
    print_json(as_json(found)) if json else show(found)
