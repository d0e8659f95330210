"""A typer group that imports a command's module only when that command is used."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pop_local.ui.errors import guard


@dataclass(frozen=True)
class Entry:
    """A command: its module holds one function of the command's own name."""

    name: str
    module: str
    help: str


class LazyCommand(TyperCommand):
    """Stands in the group's listing; becomes the real command once it gets arguments."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(name=entry.name, help=entry.help)
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        return self._load().make_context(info_name, args, parent=parent, **extra)

    def _load(self) -> Any:
        function = getattr(importlib.import_module(self._entry.module), self._entry.name)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(
            name=self._entry.name,
            no_args_is_help=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )(function)
        return typer.main.get_command(single)


def lazy_group(entries: Sequence[Entry]) -> type[TyperGroup]:
    """A group class for `typer.Typer(cls=...)` that knows these commands by name."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = {entry.name: LazyCommand(entry) for entry in entries}

        def invoke(self, ctx: Any) -> Any:
            with guard(debug=ctx.params["debug"]):
                return super().invoke(ctx)

    return LazyGroup
