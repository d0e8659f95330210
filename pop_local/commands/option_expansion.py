"""Groups of command-line options. A command receives each group as one object."""

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, get_args

import typer

EXPERT = "Expert"
# Placeholders for values in the help.
UNITS = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Group:
    """Related options. `panel` is the group's heading in the help ("" for no heading)."""

    panel: ClassVar[str] = ""


def option(words: str, unit: str = "", *, default: Any = None, flag: str = "", **how: Any) -> Any:
    """Return a Group field for an option whose help text is `words`.

    `unit`: the value's placeholder in the help (default: N, X, or TEXT). `flag`: the option's
    names (default: the field's name prefixed with `--`). `how`: more arguments for typer.Option.
    """
    how |= {"metavar": unit or None, "help": words}
    return field(default=default, metadata={"flag": flag, "how": how})


# An option that few users need, in a panel at the end of the help.
expert = partial(option, rich_help_panel=EXPERT)


def _is_expert(parameter: inspect.Parameter) -> bool:
    metadata = getattr(parameter.annotation, "__metadata__", (None,))
    return getattr(metadata[0], "rich_help_panel", None) == EXPERT


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's Group parameters with one parameter per option, as Typer requires.

    If a Group parameter has a default value, the options take their defaults from its fields.
    """
    options: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind, default = parameter.annotation, parameter.default
        if is_dataclass(kind):
            groups[parameter.name] = kind
            defaults = {} if default is parameter.empty else vars(default)
            options += [_option(each, kind, defaults) for each in fields(kind)]
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{each.name: given.pop(each.name) for each in fields(kind)})
        command(**given)

    options.sort(key=_is_expert)  # the help shows panels in the order of their first options
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {each.name: each.annotation for each in options}
    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return called


def _option(one: "Field[Any]", kind: Any, defaults: dict[str, Any]) -> inspect.Parameter:
    flags = (one.metadata["flag"] or f"--{one.name.replace('_', '-')}").split()
    how = {"rich_help_panel": kind.panel or None} | one.metadata["how"]
    kinds = {one.type, *get_args(one.type)}
    how["metavar"] = how["metavar"] or next((UNITS[each] for each in UNITS if each in kinds), None)
    found = typer.Option(*flags, **how)
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=defaults.get(one.name, one.default),
        annotation=Annotated[one.type, found],
    )
