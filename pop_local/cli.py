"""The command-line app and the help text for its commands."""

from typing import Annotated

import typer

from pop_local import __version__
from pop_local.ui.lazy import HELP_OPTIONS, lazy_group

COMMANDS = {
    "chat": "Chat with a model in the terminal.",
    "run": "Ask one question, optionally about files or piped text.",
    "serve": "Serve a model over the OpenAI, Anthropic and Ollama APIs.",
    "convert": "Write a copy of a GGUF model that reads prompts faster.",
    "strip": "Restore the original file from a converted copy.",
    "bench": "Measure the time to first token with and without pruning.",
    "eval": "Measure the quality loss from pruning.",
    "compare": "Compare full and pruned answers to your prompts.",
    "analyze": "Measure which layers are needed to read prompts.",
    "demo": "Answer one long prompt with and without pruning.",
    "inspect": "Show the contents of a model file.",
    "pull": "Fetch a model from the catalog or a hub.",
    "list": "List the local models.",
    "rm": "Remove models.",
    "learn": "Show or delete the statistics learned from your prompts.",
    "cache": "Show or remove the stored KV caches of earlier prompts.",
    "config": "Show and change settings.",
    "doctor": "Check this installation and suggest fixes.",
}

app = typer.Typer(
    name="pop-local",
    cls=lazy_group("pop_local.commands", COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_OPTIONS},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pop-local {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and llama.cpp's log.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Prefill-only pruning for GGUF models: read long prompts faster on your own machine."""


def main() -> None:
    app(prog_name="pop-local")
