"""A Typer group that imports a command's module on first use."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pop_local.config import settings
from pop_local.ui.error_output import guard
from pop_local.ui.hints import hints_for

HELP_OPTIONS = ["-h", "--help"]


def sub_app(**how: Any) -> typer.Typer:
    """Return a Typer app for a command or a group. `how`: additional arguments for typer.Typer."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP_OPTIONS},
        **how,
    )


def imported(package: str, name: str) -> Any:
    """Import a command's module, and return the function or Typer app with the same name."""
    word = name.replace("-", "_")
    return getattr(importlib.import_module(f"{package}.{word}"), word)


def _command(package: str, name: str) -> Any:
    function = imported(package, name)
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    single = sub_app()
    single.command(
        name=name,
        help=_paragraphs(function.__doc__),
        no_args_is_help=False,
        context_settings={"help_option_names": HELP_OPTIONS},
    )(function)
    return typer.main.get_command(single)


def _defaults(command: Any) -> dict[str, Any]:
    """Return the settings that override the defaults of a command's parameters."""
    # Never fill in required arguments: `rm` would delete the default model.
    wanted = {param.name for param in command.params if not param.required} & {*settings.KEYS}
    found = settings.given() if wanted else {}
    return {name: value for name, value in found.items() if name in wanted}


def _shown_without_type(command: Any, ctx: Any) -> None:
    """Hide the type <bool>, which Typer 0.29 and later show for flags."""
    for param in command.get_params(ctx):
        if getattr(param, "is_flag", False):
            param.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _shown_without_type(each, ctx)


def _paragraphs(docstring: str | None) -> str:
    """Join the lines of each paragraph (Typer does this only for the first paragraph)."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def lazy_group(package: str, commands: Mapping[str, str]) -> type[TyperGroup]:
    """Return a group class for typer.Typer. `commands` maps command names to help texts."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            # The list of commands needs only these placeholders.
            self.commands = {name: TyperCommand(name, help=commands[name]) for name in commands}

        def format_help(self, ctx: Any, formatter: Any) -> None:
            _shown_without_type(self, ctx)
            super().format_help(ctx, formatter)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            is_unknown = args[0] not in commands and not ctx.resilient_parsing
            if is_unknown and (hint := hints_for("commands").get(args[0])):
                ctx.fail(f"No such command {args[0]!r}: {hint}")
            name, known, given = super().resolve_command(ctx, args)
            if name is None:
                return name, known, given
            command = _command(package, name)
            _shown_without_type(command, ctx)
            # Completion and help must work with invalid settings.
            if not ctx.resilient_parsing and not {*given} & {*HELP_OPTIONS}:
                ctx.default_map = {name: _defaults(command)}
            ctx.obj = [*given]  # a copy, because parsing empties the list
            return name, command, given

        def invoke(self, ctx: Any) -> Any:
            with guard(debug=ctx.params["debug"]):
                try:
                    return super().invoke(ctx)
                except Exception as error:
                    if unknown := getattr(error, "option_name", ""):
                        for option, hint in hints_for("options").items():
                            if option in ctx.obj and option.startswith(unknown):
                                message = f"No such option: {option}: {hint}"
                                error.message = message  # type: ignore[attr-defined]
                    raise

    return LazyGroup
