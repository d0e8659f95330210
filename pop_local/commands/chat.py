"""`pop-local chat [MODEL]`: chat with a model in the terminal or the browser."""

import socket
import sys
import threading
import webbrowser
from dataclasses import fields, replace
from typing import Annotated

import typer

from pop_local.commands import opening
from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import expand_options
from pop_local.commands.serve import ServerOptions, serve_named
from pop_local.models.model_names import lookup
from pop_local.ui.chat.dialogue import Dialogue, pruning_state, warn_of_base_model
from pop_local.ui.chat.repl import talk
from pop_local.ui.chat.screen import Screen
from pop_local.ui.console import note
from pop_local.ui.error_output import EXIT_FAILED

# The port is fixed, because browsers store chats by address.
_PORT = 8081


def _in_browser(call: typer.Context, model: str | None, opened: opt.ModelOptions) -> None:
    names = ("system", *(field.name for field in fields(opt.SamplingOptions)))
    sources = {name: call.get_parameter_source(name) for name in names}
    # Settings also supply values, which the page ignores.
    typed = [name for name in names if (source := sources[name]) and source.name == "COMMANDLINE"]
    if typed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise typer.BadParameter(f"the web page does not support {flags}", param_hint="--web")

    def show(root: str) -> None:
        # A browser that runs in the terminal blocks until the user closes it.
        threading.Thread(target=webbrowser.open, args=(root,), daemon=True).start()

    port = _PORT
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        note(f"Port {port} is in use. The page uses another port and does not show earlier chats.")
        port = 0
    serve_named(model, ServerOptions(port=port), opened, show)


@expand_options
def chat(
    call: typer.Context,
    model: opt.OptionalModel = None,
    *,
    system: opt.System = "",
    web: Annotated[
        bool, typer.Option("--web", help="Chat in the browser instead of the terminal.")
    ] = False,
    opened: opt.ModelOptions = opt.ModelOptions(refill="idle"),
    sampling: opt.SamplingOptions,
) -> None:
    """Chat with a model.

    In the chat, /help lists the commands. If you pipe text to `chat`, each line is one question.
    """
    if web:
        _in_browser(call, model, opened)
        return
    # A pipe delivers its next line immediately, without idle time.
    if not sys.stdin.isatty():
        opened = replace(opened, refill="off")
    prompts = opening.open_prompt_cache(opened)
    name = model or opening.default_model()
    open_named = opening.Opener(name, opened, prompt_cache=prompts)
    begun = Dialogue(
        open_named(),
        open_named,
        Screen(),
        system=system,
        sampling=sampling.given,
        refill=opened.refill,
    )
    warn_of_base_model(begun.screen, begun.model)
    if sys.stdin.isatty():
        engine = begun.model.engine
        note(pruning_state(begun.model))
        if mmproj := engine.options.mmproj:
            note(f"Images are enabled ({mmproj.name}). To attach an image, type /image PATH.")
        entry, n_ctx = lookup(name), engine.context.n_ctx
        title = entry.short_name if entry else engine.context.files.path.stem
        note(f"Ask {title} a question, or type /help. The context length is {n_ctx:,} tokens.")
    try:
        talk(begun)
    finally:
        opening.store_prompts(begun.model)
        begun.model.close()
    if begun.has_failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_FAILED)
