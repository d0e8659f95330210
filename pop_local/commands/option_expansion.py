"""Commands that take groups of options as one object each."""

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar

import typer


@dataclass(frozen=True)
class Group:
    """Options that belong together; `panel` is their heading in the help, "" for none."""

    panel: ClassVar[str] = ""


def option(words: str, unit: str = "", *, default: Any = None, flag: str = "", **how: Any) -> Any:
    """Return a field of a Group: an option whose help is `words`.

    `unit`: a name for its value, "" for that of the type. `flag`: its name, and perhaps a short
    one, "" for the field's. `how` goes to typer.
    """
    how |= {"metavar": unit or None, "help": words}
    return field(default=default, metadata={"flag": flag, "how": how})


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the options of each parameter whose type is a Group.

    The command is called with the objects. Where a parameter has a default, its options have theirs
    from that.
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

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {each.name: each.annotation for each in options}
    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return called


def _option(one: "Field[Any]", kind: Any, defaults: dict[str, Any]) -> inspect.Parameter:
    flags = (one.metadata["flag"] or f"--{one.name.replace('_', '-')}").split()
    found = typer.Option(*flags, rich_help_panel=kind.panel or None, **one.metadata["how"])
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=defaults.get(one.name, one.default),
        annotation=Annotated[one.type, found],
    )
