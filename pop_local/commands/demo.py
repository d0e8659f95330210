"""`pop-local demo [MODEL]`: answer a question about a document with and without pruning."""

import sys
from typing import Annotated

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.opening import Opener
from pop_local.commands.option_expansion import expand_options
from pop_local.models.model_names import DEFAULT_MODEL
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import talk
from pop_local.ui.chat.screen import Screen
from pop_local.ui.tables import print_json
from pop_local.ui.theme import look, note
from pop_local.ui.watch import terminal_watch

N_PAIRS = 3


@expand_options
def demo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A converted GGUF file or a catalog name."),
    ] = DEFAULT_MODEL,
    *,
    pairs: Annotated[
        int, typer.Option(min=1, help="Number of pairs of answers, in full and pruned.")
    ] = N_PAIRS,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and do not open the chat.")
    ] = False,
    system: opt.System = "",
    how: opt.OpenOptions,
    sampling: opt.SamplingOptions,
    theme: opt.Theme = opt.DEFAULT_THEME,
) -> None:
    """Answer one question about a document with and without pruning, then open the chat.

    Both answers are short and greedy, so that they can be compared. Sampling options apply to the
    chat.
    """
    screen = Screen(look(theme))
    open_named = Opener(model, opt.ModelOptions(**vars(how)))
    from pop_local.ui.views.demonstration import show_demonstration
    from pop_local.workflows.demonstrate import data_path, demonstrate

    opened = open_named()
    with terminal_watch() as watch:
        found = demonstrate(opened, pairs, watch)
    if json:
        print_json(found)
        return
    show_demonstration(found)
    if sys.stdin.isatty():
        note("Now it is your turn. Pruning is on; type /help for commands, /exit to quit.")
        note(f"To ask about the document: /file {data_path('document.md')}")
        talk(Dialogue(opened, open_named, screen, system=system, sampling=sampling.given))
