"""Names the commands, nothing else."""

from typing import Annotated

import typer

from pop_local import __version__
from pop_local.ui.lazy import HELP_OPTIONS, lazy_group

COMMANDS = {
    "chat": "Talk to a model in the terminal.",
    "run": "Ask one question, also about a file or piped text.",
    "serve": "Serve a model to programs, by OpenAI's and Ollama's API.",
    "rpc-server": "Lend this machine to another one.",
    "convert": "Make a pruned-prefill copy of a GGUF model.",
    "strip": "Turn a converted file back into the original.",
    "bench": "Measure time to first token, full against pruned.",
    "eval": "Measure quality, pruned against full.",
    "compare": "Answer your own prompts in full and pruned.",
    "analyze": "Measure which layers reading can do without.",
    "demo": "Answer one long prompt with and without pruning.",
    "inspect": "Show what is in a model file.",
    "pull": "Fetch a model by name, from a hub or a URL.",
    "list": "Show the models that are here.",
    "rm": "Remove models.",
    "learn": "Show or forget what was learned while reading.",
    "config": "Show and change the settings.",
    "doctor": "Check this installation and say what to fix.",
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
        bool, typer.Option("--debug", help="Show the trace of an error, and llama.cpp's log.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Prefill-only pruning for GGUF models: long prompts are read faster, on your own machine."""


def main() -> None:
    app(prog_name="pop-local")  # also as python -m pop_local
