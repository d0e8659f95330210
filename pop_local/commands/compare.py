"""`pop-local compare MODEL PROMPTS.jsonl`: compare answers with and without pruning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.tables import print_json
from pop_local.ui.views.compare import comparison_json, show_comparison
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.compare import compare_answers


@dataclass(frozen=True)
class GreedyOptions(Group):
    # The field is not named max_tokens, because the setting `max_tokens` is for conversations.
    longest: int = option(
        "Maximum answer length in tokens.", flag="--max-tokens", min=1, default=256
    )
    mmproj: Path | None = option(opt.MMPROJ, "FILE")


@expand_options
def compare(
    model: opt.Converted,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS.jsonl",
            help='A file with one prompt per line: {"prompt": TEXT} or {"messages": [...]}. You can'
            ' add "documents": [TEXT, {"file": PATH}], "images": [PATH], and "answer": TEXT (the'
            " correct answer).",
        ),
    ],
    *,
    how: GreedyOptions,
    json: opt.Json = False,
    measured: opt.MeasureOptions,
) -> None:
    """Answer your prompts with and without fast reading, and compare the answers and times.

    Decoding is greedy. If you supply the correct answers, the command counts the questions that
    are answered correctly with and without fast reading. The command also tests whether the
    difference between the two counts could be due to chance.
    """
    with stoppable_watch() as watch:
        comparison = compare_answers(
            model,
            prompts,
            max_tokens=how.longest,
            n_ctx=measured.n_ctx,
            sidecar=measured.sidecar,
            mmproj=how.mmproj,
            hardware=measured.hardware,
            watch=watch,
        )
    print_json(comparison_json(comparison)) if json else show_comparison(comparison)
