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
    how |= {"metavar": unit or None, "help": words, "show_default": "(default" not in words}
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
            options += [_option(entry, kind, defaults) for entry in fields(kind)]
        else:
            options.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    def with_groups(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{entry.name: values.pop(entry.name) for entry in fields(kind)})
        command(**values)

    options.sort(key=_is_expert)  # the help shows panels in the order of their first options
    with_groups.__name__, with_groups.__doc__ = command.__name__, command.__doc__
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    with_groups.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return with_groups


def _option(entry: "Field[Any]", kind: Any, defaults: dict[str, Any]) -> inspect.Parameter:
    flags = (entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}").split()
    how = {"rich_help_panel": kind.panel or None} | entry.metadata["how"]
    types = {entry.type, *get_args(entry.type)}
    how["metavar"] = how["metavar"] or next((UNITS[unit] for unit in UNITS if unit in types), None)
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=defaults.get(entry.name, entry.default),
        annotation=Annotated[entry.type, typer.Option(*flags, **how)],
    )
