"""`pop-local eval MODEL`: measure the quality loss from pruning."""

from dataclasses import dataclass
from pathlib import Path

from pop_converter.popfile.format import DeepRows
from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, expert, option
from pop_local.measure.quality import QualitySettings
from pop_local.ui.tables import print_json
from pop_local.ui.views.eval import evaluation_json, show_evaluation
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.eval import EvaluateOptions, evaluate


@dataclass(frozen=True)
class WindowOptions(Group):
    text: Path | None = option("Text file for the measurement (default: built-in text).", "FILE")
    context: int = option("Number of context tokens per window.", min=2, default=512)
    continuation: int = expert("Number of tokens to score after each context.", min=2, default=128)
    windows: int = option("Number of windows to score.", min=1, default=32)
    lookups: int = option("Number of questions about exact strings.", min=0, default=100)
    seed: int = expert("Seed for choosing passages, random tokens, and look-ups.", min=0, default=0)
    deep_rows: DeepRows | None = expert(opt.DEEP_ROWS)


@expand_options
def eval(  # noqa: A001
    model: opt.Converted, *, on: WindowOptions, json: opt.Json = False, measured: opt.MeasureOptions
) -> None:
    """Measure fast reading's quality loss: KL divergence, perplexity, copying, and look-ups."""
    options = EvaluateOptions(
        text=on.text,
        settings=QualitySettings(on.windows, on.context, on.continuation, on.seed),
        n_lookups=on.lookups,
        deep_rows=on.deep_rows,
        n_ctx=measured.n_ctx,
    )
    with stoppable_watch() as watch:
        evaluation = evaluate(
            model, options, sidecar=measured.sidecar, hardware=measured.hardware, watch=watch
        )
    print_json(evaluation_json(evaluation)) if json else show_evaluation(evaluation)
