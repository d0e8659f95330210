"""`pop-local chat [MODEL]`: talk to a model in the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pop_local.commands.options import (
    DEFAULT_THEME,
    Ctx,
    GpuLayers,
    MaxTokens,
    NoPop,
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
from pop_local.ui.errors import EXIT_FAILED
from pop_local.ui.theme import look, note
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.open import open_in_full, open_model

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A GGUF file or a name of the catalog. Default: {DEFAULT_MODEL}",
        ),
    ] = None,
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    pop: Pop = None,
    no_pop: NoPop = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Ctx = None,
    gpu_layers: GpuLayers = -1,
    theme: Theme = DEFAULT_THEME,
) -> None:
    """Talk to a model; /help lists the commands inside. Piped lines are questions, one each."""
    screen = TerminalScreen(look(theme))

    open_as_asked = open_in_full if no_pop else open_model
    on = hardware(threads, gpu_layers)

    def open_named(name: str | None, n_ctx: int | None) -> "PopModel":
        sidecar = None if name else pop
        with terminal_watch() as watch:
            return open_as_asked(
                name or model, sidecar, n_ctx=n_ctx or ctx, hardware=on, watch=watch
            )

    chosen = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opened = open_named(None, None)
    begun = Dialogue(opened, open_named, screen, system=system, sampling=chosen)
    begun.warn_of_base()
    if sys.stdin.isatty():
        _greet(begun)
    talk(begun)
    if begun.has_failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_FAILED)


def _greet(begun: Dialogue) -> None:
    note(f"{begun.model.model_path}, context of {begun.model.n_ctx():,} tokens.")
    note(begun.pop_state())
    note("Type a question, /help for the commands, /exit to leave.")
