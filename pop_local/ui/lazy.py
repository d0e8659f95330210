"""A Typer group that imports a command's module on first use."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

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


def sub_app(**how: Any) -> typer.Typer:
    """Return a Typer app for a command or a group. `how`: additional arguments for typer.Typer."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP_OPTIONS},
        **how,
    )


def imported(package: str, name: str) -> Any:
    """Import a command's module and return the function or Typer app named after the command."""
    word = name.replace("-", "_")
    return getattr(importlib.import_module(f"{package}.{word}"), word)


def _command(package: str, name: str, example: str) -> Any:
    function = imported(package, name)
    if not isinstance(function, typer.Typer):
        single = sub_app()
        single.command(
            name=name, no_args_is_help=False, context_settings={"help_option_names": HELP_OPTIONS}
        )(function)
        function = single
    command = typer.main.get_command(function)
    command.help = f"{_paragraphs(command.help)}\n\nExample: pop-local {name} {example}"
    return command


def _defaults(command: Any) -> dict[str, Any]:
    """Return the settings that override the defaults of a command's parameters."""
    # Never fill in required arguments: `rm` would delete the default model.
    wanted = {param.name for param in command.params if not param.required} & {*settings.KEYS}
    found = settings.given() if wanted else {}
    return {name: value for name, value in found.items() if name in wanted}


def _simplify_help(command: Any, ctx: Any) -> None:
    """Hide types and ranges in the help, and append default values to the help text."""
    for param in command.get_params(ctx):
        # Typer 0.29 has no options for this, so its methods are replaced.
        param._get_number_range_help_str = lambda: None
        if param.param_type_name == "argument" or getattr(param, "is_flag", False):
            param.display_type_rich = lambda ctx: None
        words = getattr(param, "help", None) or ""
        if getattr(param, "show_default", False) and "(default" not in words:
            default = getattr(param.default, "value", param.default)
            if default not in (None, "") and default is not False:
                param.help = f"{words.removesuffix('.')} (default: {default})."
        param.show_default = False
    for each in getattr(command, "commands", {}).values():
        _simplify_help(each, ctx)


def _with_aliases(command: Any) -> None:
    """Accept other programs' names for options, without listing the names in the help."""
    make_parser = command.make_parser

    def with_aliases(ctx: Any) -> Any:
        parser = make_parser(ctx)
        for param in command.params:
            if names := OPTION_ALIASES.get(param.name):
                parser.add_option(obj=param, opts=names, dest=param.name, action="store")
        return parser

    command.make_parser = with_aliases


def _translated(args: list[str]) -> list[str]:
    """Translate Ollama's command names and llama.cpp's -m, -hf, and -p to pop-local's syntax."""
    name, *given = args
    if name == "help" and given:
        return [given[0], "--help"]
    name = COMMAND_ALIASES.get(name, name)
    for flag in ("-p", "-m", "-hf") if name == "run" else ("-m", "-hf"):
        if flag in given[:-1]:
            at = given.index(flag)
            value = given.pop(at + 1)
            given[at : at + 1] = []
            value = f"hf:{value}" if flag == "-hf" else value
            given.insert(len(given) if flag == "-p" else 0, value)
    return [name, *given]


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
                name: TyperCommand(name, help=each.words, rich_help_panel=each.panel)
                for name, each in commands.items()
            }

        def format_help(self, ctx: Any, formatter: Any) -> None:
            _simplify_help(self, ctx)
            super().format_help(ctx, formatter)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            args = _translated(args)
            is_unknown = args[0] not in commands and not ctx.resilient_parsing
            if args == ["help"]:
                self.get_help(ctx)
                ctx.exit()
            if is_unknown and (hint := hints_for("commands").get(args[0])):
                ctx.fail(f"No such command {args[0]!r}: {hint}")
            name, known, given = super().resolve_command(ctx, args)
            if name is None:
                return name, known, given
            command = _command(package, name, commands[name].example)
            _simplify_help(command, ctx)
            # Completion and help must work with invalid settings.
            if not ctx.resilient_parsing and not {*given} & {*HELP_OPTIONS}:
                ctx.default_map = {name: _defaults(command)}
                _with_aliases(command)
            return name, command, given

        def invoke(self, ctx: Any) -> Any:
            with guard(debug=ctx.params["debug"]):
                return super().invoke(ctx)

    return LazyGroup
