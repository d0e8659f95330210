"""Names the commands, nothing else."""

from typing import Annotated

import typer

from pop_local import __version__
from pop_local.ui.lazy import HELP_OPTIONS, Entry, lazy_group

COMMANDS = (
    Entry("chat", "pop_local.commands.chat", "Talk to a model in the terminal."),
    Entry("run", "pop_local.commands.run", "Ask one question, also about a file or piped text."),
    Entry(
        "serve",
        "pop_local.commands.serve",
        "Serve a model to programs, by OpenAI's and Ollama's API.",
    ),
    Entry("rpc-server", "pop_local.commands.rpc_server", "Lend this machine to another one."),
    Entry("convert", "pop_local.commands.convert", "Make a pruned-prefill copy of a GGUF model."),
    Entry("strip", "pop_local.commands.strip", "Turn a converted file back into the original."),
    Entry("bench", "pop_local.commands.bench", "Measure time to first token, full against pruned."),
    Entry("eval", "pop_local.commands.eval", "Measure quality, pruned against full."),
    Entry("compare", "pop_local.commands.compare", "Answer your own prompts in full and pruned."),
    Entry("analyze", "pop_local.commands.analyze", "Measure which layers reading can do without."),
    Entry("demo", "pop_local.commands.demo", "Answer one long prompt with and without pruning."),
    Entry("inspect", "pop_local.commands.inspect", "Show what is in a model file."),
    Entry("pull", "pop_local.commands.pull", "Fetch a model by name, from a hub or a URL."),
    Entry("list", "pop_local.commands.list", "Show the models that are here."),
    Entry("rm", "pop_local.commands.rm", "Remove models."),
    Entry("learn", "pop_local.commands.learn", "Show or forget what was learned while reading."),
    Entry("config", "pop_local.commands.config", "Show and change the settings."),
    Entry("doctor", "pop_local.commands.doctor", "Check this installation and say what to fix."),
)

app = typer.Typer(
    name="pop-local",
    cls=lazy_group(COMMANDS),
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
