"""`pop-local chat [MODEL]`: talk to a model in the terminal."""

import sys
from typing import Annotated

import typer

from pop_local.commands import options as opt
from pop_local.commands.opening import Opener
from pop_local.models.names import DEFAULT_MODEL
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import talk
from pop_local.ui.chat.screen import Screen
from pop_local.ui.errors import EXIT_FAILED
from pop_local.ui.theme import look, note


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A GGUF file or a name of the catalog. Default: {DEFAULT_MODEL}",
        ),
    ] = None,
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    pop: opt.Pop = None,
    no_pop: opt.NoPop = False,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    seed: opt.Seed = None,
    threads: opt.Threads = None,
    ctx: opt.Ctx = None,
    gpu_layers: opt.GpuLayers = -1,
    rpc: opt.Rpc = None,
    select: opt.Select = None,
    refill: opt.Refill = opt.RefillName.IDLE,
    theme: opt.Theme = opt.DEFAULT_THEME,
    parse_special: opt.ParseSpecial = False,
    mmproj: opt.Mmproj = None,
    image_tokens: opt.ImageTokens = None,
) -> None:
    """Talk to a model; /help lists the commands inside. Piped lines are questions, one each."""
    screen = Screen(look(theme))
    hardware = opt.hardware(threads, gpu_layers, rpc)
    # A pipe does not wait: its next line is there already.
    refilled = refill.value if sys.stdin.isatty() or refill.value == "answer" else "off"
    rows = no_pop, parse_special, opt.selected(select), refilled
    open_named = Opener(model, pop, ctx, hardware, *rows, mmproj, image_tokens)
    chosen = opt.sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    begun = Dialogue(
        open_named(), open_named, screen, system=system, sampling=chosen, refill=refilled
    )
    begun.warn_of_base()
    if sys.stdin.isatty():
        note(f"{begun.model.path}, context of {begun.model.n_ctx:,} tokens.")
        note(begun.pop_state())
        if begun.model.mmproj:
            note(f"It sees pictures, by {begun.model.mmproj.name}: /image PATH.")
        note("Type a question, /help for the commands, /exit to leave.")
    talk(begun)
    if begun.has_failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_FAILED)
