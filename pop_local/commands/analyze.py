"""`pop-local analyze MODEL`: measure the quality loss at each boundary."""

from dataclasses import dataclass
from pathlib import Path

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.tables import print_json
from pop_local.ui.views.analysis import as_json, show
from pop_local.ui.watch import stoppable_watch


@dataclass(frozen=True)
class ProbeOptions(Group):
    text: Path | None = option("Text file for the measurement (default: built-in prose).", "FILE")
    tokens: int | None = option(
        "Number of tokens for the fit (default: a quarter of convert's default).", min=1
    )
    markdown: bool = option(opt.MARKDOWN, default=False)


@expand_options
def analyze(
    model: opt.Model,
    *,
    by: ProbeOptions,
    json: opt.Json = False,
    processors: opt.HardwareOptions,
) -> None:
    """Measure the quality loss at each boundary to find out how many layers a model can skip."""
    from pop_local.research import layer_analysis

    options = layer_analysis.AnalyzeOptions(by.text, by.tokens)
    with stoppable_watch() as watch:
        found = layer_analysis.analyze(model, options, hardware=processors.hardware, watch=watch)
    print_json(as_json(found)) if json else show(found, as_markdown=by.markdown)
