"""`pop-local chat [MODEL]`: talk to a model in the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pop_local.commands.options import (
    Ctx,
    GpuLayers,
    MaxTokens,
    NoPop,
    Pop,
    Seed,
    Temperature,
    Threads,
    TopP,
    sampling,
)
from pop_local.commands.ready import open_ready
from pop_local.models import DEFAULT_MODEL
from pop_local.ui.repl import Repl
from pop_local.ui.screen import TerminalScreen, read_line
from pop_local.ui.theme import note, warn

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel

BASE_MODEL_WARNING = (
    "This is a base model without a chat template: it continues text rather than answers."
)


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
) -> None:
    """Talk to a model; /help lists the commands inside. Piped lines are questions, one each."""
    opened = open_ready(
        model, threads=threads, ctx=ctx, gpu_layers=gpu_layers, no_pop=no_pop, pop=pop
    )
    repl = Repl(
        opened,
        read_line,
        TerminalScreen(),
        system=system,
        sampling=sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed),
    )
    if "tokenizer.chat_template" not in opened.metadata:
        warn(BASE_MODEL_WARNING)
    if sys.stdin.isatty():
        _greet(opened, repl)
    repl.run()


def _greet(opened: "PopModel", repl: Repl) -> None:
    note(f"{opened.model_path}, context of {opened.n_ctx():,} tokens.")
    note(repl.pop_state())
    note("Type a question, /help for the commands, /exit to leave.")
