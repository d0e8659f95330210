"""The command-line app and the help text for its commands."""

from typing import Annotated

import typer

from pop_local import __version__
from pop_local.ui.lazy import HELP_OPTIONS, Listed, lazy_group

_USE, _MODELS, _SPEED, _SETUP = "Use", "Models", "Speed and quality", "Setup"
COMMANDS = {
    "chat": Listed(_USE, "Chat with a model in the terminal.", "qwen-1.5b"),
    "run": Listed(
        _USE, "Ask one question, optionally about files.", 'qwen-1.5b -f report.pdf "Who paid?"'
    ),
    "serve": Listed(
        _USE, "Serve a model over the OpenAI, Anthropic, and Ollama APIs.", "qwen-1.5b"
    ),
    "launch": Listed(_USE, "Start a coding agent that uses a local model.", "opencode qwen-1.5b"),
    "demo": Listed(_USE, "Answer one long prompt with and without fast reading.", "smollm2"),
    "pull": Listed(
        _MODELS, "Download a model from the catalog or the Hugging Face Hub.", "qwen3-8b"
    ),
    "list": Listed(_MODELS, "List the local models.", "--json"),
    "inspect": Listed(_MODELS, "Show the contents of a model file.", "smollm2"),
    "rm": Listed(_MODELS, "Remove models.", "qwen3-8b"),
    "convert": Listed(
        _SPEED, "Write a copy of a GGUF model that reads prompts faster.", "model.gguf"
    ),
    "bench": Listed(
        _SPEED,
        "Measure the time to first token with and without fast reading.",
        "smollm2 --repeat 3",
    ),
    "eval": Listed(_SPEED, "Measure the quality loss from fast reading.", "smollm2 --windows 8"),
    "compare": Listed(
        _SPEED,
        "Compare answers to your prompts with and without fast reading.",
        "smollm2 prompts.jsonl",
    ),
    "analyze": Listed(_SPEED, "Measure how many layers a model can skip.", "model.gguf"),
    "config": Listed(_SETUP, "Show the settings and their sources.", "--json"),
    "cache": Listed(_SETUP, "Remove the stored KV caches of earlier prompts.", "clear"),
    "doctor": Listed(_SETUP, "Check this installation and suggest fixes.", "--report"),
}

app = typer.Typer(
    name="pop-local",
    cls=lazy_group("pop_local.commands", COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_OPTIONS},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
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
    """Run language models on your own machine and read long prompts faster."""


def main() -> None:
    app(prog_name="pop-local")
