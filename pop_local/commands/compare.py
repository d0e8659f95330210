"""`pop-local compare MODEL PROMPTS.jsonl`: one's own prompts, answered in full and pruned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.tables import print_json
from pop_local.ui.views.comparison import comparison_json, show_comparison
from pop_local.ui.watch import stoppable_watch


@dataclass(frozen=True)
class GreedyOptions(Group):
    answers: Path | None = option("Keeps the answers; goes on where they end.", "FILE")
    # It must not be called max_tokens: the setting of that name is for conversations.
    longest: int = option("Longest answer.", flag="--max-tokens", min=1, default=256)
    mmproj: Path | None = option(opt.MMPROJ, "FILE")


@expand_options
def compare(
    model: opt.Converted,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS.jsonl",
            help='A line is {"prompt": ...}, perhaps with "documents": [TEXT, {"file": PATH}] and'
            ' "images": [PATH], or {"messages": [...]}; "answer" says what is right.',
        ),
    ],
    *,
    how: GreedyOptions,
    json: opt.Json = False,
    measured: opt.MeasureOptions,
) -> None:
    """Answer your own prompts in full and pruned, and compare: same, right, how fast.

    Answers take the likeliest tokens. With "answer" in the lines, McNemar's test tells whether
    pruning changes how many are right.
    """
    from pop_local.workflows.compare_answers import CompareOptions, compare_answers

    with stoppable_watch() as watch:
        found = compare_answers(
            model,
            prompts,
            CompareOptions(how.longest, measured.n_ctx, how.answers, how.mmproj),
            sidecar=measured.sidecar,
            hardware=measured.hardware,
            watch=watch,
        )
    print_json(comparison_json(found)) if json else show_comparison(found)
