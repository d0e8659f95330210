"""A typer group that imports a command's module only when that command is used."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pop_local.config import settings
from pop_local.ui import hints
from pop_local.ui.errors import guard

HELP_OPTIONS = ["-h", "--help"]


def sub_app(**how: Any) -> typer.Typer:
    """Return an app of which a command is made; `how` goes to typer."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP_OPTIONS},
        **how,
    )


@dataclass(frozen=True)
class Entry:
    """A command: its module holds a function, or a Typer app, of the command's own name."""

    name: str
    module: str
    help: str

    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name.replace("-", "_"))


class LazyCommand(TyperCommand):
    """Stands in the group's listing; becomes the real command once it gets arguments.

    The settings are the defaults of its parameters. They are read for a command that has such
    parameters only.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(name=entry.name, help=entry.help)
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        command = self._load()
        # Required arguments are never filled in: `rm` would take the default model.
        wanted = {param.name for param in command.params if not param.required} & {*settings.KEYS}
        # Completion and help work whatever the values are.
        if wanted and not extra.get("resilient_parsing") and not {*args} & {*HELP_OPTIONS}:
            values = settings.given().items()
            extra["default_map"] = {name: value for name, value in values if name in wanted}
        given = [*args]  # which parsing takes apart
        try:
            return command.make_context(info_name, args, parent=parent, **extra)
        except Exception as error:
            if unknown := getattr(error, "option_name", ""):
                known = (option for option in hints.FOREIGN_OPTIONS if option in given)
                for option in filter(lambda option: option.startswith(unknown), known):
                    message = f"No such option: {option}: {hints.FOREIGN_OPTIONS[option]}"
                    error.message = message  # type: ignore[attr-defined]
            raise

    def _load(self) -> Any:
        function = self._entry.function()
        if isinstance(function, typer.Typer):
            return typer.main.get_command(function)
        single = sub_app()
        single.command(
            name=self._entry.name,
            help=_paragraphs(function.__doc__),
            no_args_is_help=False,
            context_settings={"help_option_names": HELP_OPTIONS},
        )(function)
        return typer.main.get_command(single)


def _paragraphs(docstring: str | None) -> str:
    """Join each paragraph's lines; Typer does so only in the first."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def lazy_group(entries: Sequence[Entry]) -> type[TyperGroup]:
    """Return a group class of these commands, for `typer.Typer(cls=...)`."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = {entry.name: LazyCommand(entry) for entry in entries}

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if words := not ctx.resilient_parsing and hints.FOREIGN_COMMANDS.get(args[0]):
                ctx.fail(f"No such command {args[0]!r}: {words}")
            return super().resolve_command(ctx, args)

        def invoke(self, ctx: Any) -> Any:
            with guard(debug=ctx.params["debug"]):
                return super().invoke(ctx)

    return LazyGroup
