"""A Typer group that imports a command's module on first use."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from pop_local.config import settings
from pop_local.ui.error_output import guard
from pop_local.ui.hints import hints_for

HELP_OPTIONS = ["-h", "--help"]
COMMAND_ALIASES = {"ls": "list", "show": "inspect"}
# Options of llama.cpp and Ollama, by the name of the commands' parameter.
OPTION_ALIASES = {
    **dict.fromkeys(("ctx", "n_ctx"), ("-c", "--ctx-size")),
    **dict.fromkeys(("max_tokens", "longest"), ("-n", "--n-predict", "--num-predict")),
    "threads": ("-t",),
    "gpu_layers": ("-ngl", "--n-gpu-layers"),
    "temperature": ("--temp",),
    "prompt": ("-p",),
    "cache_type_k": ("-ctk",),
    "cache_type_v": ("-ctv",),
    "parallel": ("-np",),
    "system": ("-sys",),
}


@dataclass(frozen=True)
class Listed:
    """A command's entry in the list of commands (panel and description), and example arguments."""

    panel: str
    words: str
    example: str


def imported(package: str, name: str) -> Any:
    """Import a command's module and return the function or Typer app named after the command."""
    word = name.replace("-", "_")
    return getattr(importlib.import_module(f"{package}.{word}"), word)


class _AliasedCommand(TyperCommand):
    """A command that accepts other programs' names for options without listing them in the help."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        for param in self.params:
            names = OPTION_ALIASES.get(param.name or "")
            if names and isinstance(param, TyperOption):
                parser.add_option(obj=param, opts=names, dest=param.name, action="store")
        return parser


def _command(package: str, name: str, example: str) -> Any:
    app = imported(package, name)
    if not isinstance(app, typer.Typer):
        function, app = app, typer.Typer(add_completion=False)
        app.command(name=name, cls=_AliasedCommand)(function)
    command = typer.main.get_command(app)
    command.help = f"{_paragraphs(command.help)}\n\nExample: pop-local {name} {example}"
    return command


def _defaults(command: Any) -> dict[str, Any]:
    """Return the settings that override the defaults of a command's parameters."""
    # Never fill in required arguments: `rm` would delete the default model.
    names = {param.name for param in command.params if not param.required} & {*settings.KEYS}
    values = settings.given() if names else {}
    return {name: value for name, value in values.items() if name in names}


def _translated(args: list[str]) -> list[str]:
    """Translate Ollama's command names and llama.cpp's -m, -hf, and -p to pop-local's syntax."""
    name, *rest = args
    if name == "help" and rest:
        return [rest[0], "--help"]
    name = COMMAND_ALIASES.get(name, name)
    for flag in ("-p", "-m", "-hf") if name == "run" else ("-m", "-hf"):
        if flag in rest[:-1]:
            at = rest.index(flag)
            value = f"hf:{rest[at + 1]}" if flag == "-hf" else rest[at + 1]
            del rest[at : at + 2]
            rest.insert(len(rest) if flag == "-p" else 0, value)
    return [name, *rest]


def _paragraphs(docstring: str | None) -> str:
    """Join the lines of each paragraph (Typer does this only for the first paragraph)."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def lazy_group(package: str, commands: Mapping[str, Listed]) -> type[TyperGroup]:
    """Return a group class for typer.Typer. `commands` maps command names to help texts."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            # The list of commands needs only these placeholders.
            self.commands = {
                name: TyperCommand(name, help=entry.words, rich_help_panel=entry.panel)
                for name, entry in commands.items()
            }

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            args = _translated(args)
            if args == ["help"]:
                self.get_help(ctx)
                ctx.exit()
            is_unknown = args[0] not in commands and not ctx.resilient_parsing
            if is_unknown and (hint := hints_for("commands").get(args[0])):
                ctx.fail(f"No such command {args[0]!r}: {hint}")
            name, placeholder, arguments = super().resolve_command(ctx, args)
            if name is None:
                return name, placeholder, arguments
            command = _command(package, name, commands[name].example)
            # Completion and help must work with invalid settings.
            if not ctx.resilient_parsing and not {*arguments} & {*HELP_OPTIONS}:
                ctx.default_map = {name: _defaults(command)}
            return name, command, arguments

        def invoke(self, ctx: Any) -> Any:
            with guard(debug=ctx.params["debug"]):
                return super().invoke(ctx)

    return LazyGroup
