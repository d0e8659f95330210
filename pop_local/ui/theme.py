"""The one theme and the two consoles: answers and data on `out`, everything else on `err`."""

import os

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_local.ui.printable import printable

THEME = Theme(
    {
        "error": "bold red",
        "hint": "cyan",
        "note": "dim",
        "good": "green",
        "bad": "bold red",
        "warn": "yellow",
        "title": "bold",
        "thinking": "dim",
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "bar.complete": "cyan",
        "bar.finished": "green",
    }
)


class _Console(Console):
    @property
    def is_terminal(self) -> bool:
        """False for a pipe, even with FORCE_COLOR or TTY_COMPATIBLE."""
        return super().is_terminal and (self._force_terminal is not None or self.file.isatty())


def _console(*, stderr: bool) -> Console:
    # rich drops only the colours for NO_COLOR; without a colour system bold and dim go as well.
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(
        theme=THEME,
        stderr=stderr,
        highlight=False,
        color_system=None if plain else "auto",
    )


out = _console(stderr=False)
err = _console(stderr=True)


# The Pygments style of code in answers; "": no Markdown, as the model wrote them.
LOOKS = {"terminal": "ansi_dark", "dark": "monokai", "light": "default", "plain": ""}


def look(name: str) -> str:
    """Return one of LOOKS, or the Pygments style of this name. Raises PopError.

    It is plain where colours are off, and on a terminal that cannot move its cursor.
    """
    from pygments.styles import get_all_styles

    known = {style: style for style in get_all_styles()} | LOOKS
    if name not in known:
        hint = nearest_hint(name, {style: style for style in known}, "known: " + ", ".join(LOOKS))
        raise PopError(f"there is no theme {name}", hint)
    is_plain = os.environ.get("NO_COLOR") or out.is_dumb_terminal or not out.is_terminal
    return LOOKS["plain"] if is_plain else known[name]


def say(text: str) -> None:
    """Print lines of data on stdout; a pipe gets them unchanged."""
    out.file.write((printable(text, kept="\n") if out.is_terminal else text) + "\n")


def note(message: str) -> None:
    """Print one line of news on stderr."""
    _tell(message, "note")


def warn(message: str) -> None:
    """Print one line on stderr that the user should not miss."""
    _tell(message, "warn")


def _tell(message: str, style: str) -> None:
    err.print(Text(printable(message), style), soft_wrap=not err.is_terminal)
