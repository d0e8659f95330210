"""Commands that take groups of options as one object each."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, get_args


@dataclass(frozen=True)
class Group:
    """Options that belong together; `panel` is their heading in the help, "" for none."""

    panel: ClassVar[str] = ""


def unfolded(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the options of each parameter whose type is a Group.

    The command is called with the objects. Where a parameter has a default, its options have theirs
    from that.
    """
    options: list[inspect.Parameter] = []
    groups: dict[str, type[Group]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind, default = parameter.annotation, parameter.default
        if is_dataclass(kind):
            groups[parameter.name] = kind  # type: ignore[assignment]
            options += _options(groups[parameter.name], default)
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {option.name: option.annotation for option in options}
    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return called


def _options(kind: type[Group], default: Any) -> list[inspect.Parameter]:
    found = []
    for field in fields(kind):
        of, option = get_args(field.type)
        option = copy(option)
        option.rich_help_panel = kind.panel or option.rich_help_panel
        has_none = default is inspect.Parameter.empty
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default if has_none else getattr(default, field.name),
                annotation=Annotated[of, option],
            )
        )
    return found
