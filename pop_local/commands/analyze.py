"""`pop-local analyze MODEL`: measure the cost of each boundary."""

from dataclasses import dataclass
from pathlib import Path

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.tables import print_json
from pop_local.ui.views.analysis import as_json, show
from pop_local.ui.watch import stoppable_watch


@dataclass(frozen=True)
class ProbeOptions(Group):
    text: Path | None = option("Text to measure on (default: built-in prose).", "FILE")
    context: int = option("Context tokens per window.", min=32, default=192)
    continuation: int = option("Answer tokens per window, after the context.", min=2, default=64)
    tokens: int | None = option("Tokens to fit on (default: 1/4 of convert's default).", min=1)
    seed: int = option("Seed for choosing passages and random tokens.", min=0, default=0)
    markdown: bool = option(opt.MARKDOWN, default=False)


@expand_options
def analyze(
    model: opt.Model,
    *,
    by: ProbeOptions,
    json: opt.Json = False,
    processors: opt.HardwareOptions,
) -> None:
    """Measure the cost of each boundary, and how many layers prompts can skip."""
    from pop_local.research import layer_analysis

    options = layer_analysis.AnalyzeOptions(
        text=by.text,
        n_context=by.context,
        n_answer=by.continuation,
        fit_tokens=by.tokens,
        seed=by.seed,
    )
    with stoppable_watch() as watch:
        found = layer_analysis.analyze(model, options, hardware=processors.hardware, watch=watch)
    print_json(as_json(found)) if json else show(found, as_markdown=by.markdown)
