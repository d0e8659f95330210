"""`pop-local demo [MODEL]`: answer a question about a document with and without pruning."""

from typing import Annotated

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.opening import Opener
from pop_local.commands.option_expansion import expand_options
from pop_local.models.model_names import DEFAULT_MODEL
from pop_local.ui.tables import print_json
from pop_local.ui.watch import terminal_watch


@expand_options
def demo(
    model: opt.Converted = DEFAULT_MODEL,
    *,
    pairs: Annotated[
        int, typer.Option(min=1, help="Number of pairs of answers (full and pruned).")
    ] = 3,
    json: opt.Json = False,
    how: opt.OpenOptions,
) -> None:
    """Answer one question about a document with and without pruning.

    Both answers are short and decoded greedily, which makes them comparable.
    """
    from pop_local.ui.views.demonstration import show_demonstration
    from pop_local.workflows.demonstrate import demonstrate

    opened = Opener(model, opt.ModelOptions(**vars(how)))()
    with terminal_watch() as watch:
        found = demonstrate(opened, pairs, watch)
    print_json(found) if json else show_demonstration(found)
