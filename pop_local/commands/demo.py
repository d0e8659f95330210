"""`pop-local demo [MODEL]`: one question about a long document, with and without pruning."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pop_local.commands.options import (
    DEFAULT_THEME,
    Ctx,
    GpuLayers,
    MaxTokens,
    Pop,
    Seed,
    Temperature,
    Theme,
    Threads,
    TopP,
    hardware,
    sampling,
)
from pop_local.models.names import DEFAULT_MODEL
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import talk
from pop_local.ui.chat.screen import TerminalScreen
from pop_local.ui.tables import print_json
from pop_local.ui.theme import look, note
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.open import model_files, open_model

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel

N_PAIRS = 3


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A converted GGUF file or a catalog name. Default: {DEFAULT_MODEL}",
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="How many times to answer in full and pruned.")
    ] = N_PAIRS,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and open no chat.")
    ] = False,
    system: Annotated[str, typer.Option("--system", help="System prompt of the chat.")] = "",
    pop: Pop = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Ctx = None,
    gpu_layers: GpuLayers = -1,
    theme: Theme = DEFAULT_THEME,
) -> None:
    """Answer one question about a document with and without pruning, then open the chat.

    The answers are short and take the likeliest tokens, to be compared; how answers are sampled is
    said for the chat.
    """
    screen = TerminalScreen(look(theme))
    chosen = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    on = hardware(threads, gpu_layers)
    from pop_local.ui.views.comparison import show_comparison
    from pop_local.workflows.demo import compare_answers, data_path

    with terminal_watch() as watch:
        files = model_files(model, pop, hardware=on, watch=watch)
        opened = open_model(str(files.path), files.sidecar, n_ctx=ctx, hardware=on, watch=watch)
        found = compare_answers(opened, pairs, watch)
    if json:
        print_json(found)
        return
    show_comparison(found)
    if sys.stdin.isatty():

        def open_again(name: str | None, n_ctx: int | None) -> "PopModel":
            sidecar = None if name else files.sidecar
            with terminal_watch() as watch:
                return open_model(
                    name or str(files.path), sidecar, n_ctx=n_ctx or ctx, hardware=on, watch=watch
                )

        note("Now it is your turn; pruning is on. /help lists the commands, /exit leaves.")
        note(f"The document is not part of this chat: /file {data_path('document.md')} reads it.")
        talk(Dialogue(opened, open_again, screen, system=system, sampling=chosen))
