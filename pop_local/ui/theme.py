"""The theme and the consoles: `out` for answers and data, `err` for all other output."""

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
        "bar.complete": "cyan",
        "bar.finished": "green",
    }
)


class _Console(Console):
    @property
    def is_terminal(self) -> bool:
        """Return False for a pipe, even with FORCE_COLOR or TTY_COMPATIBLE."""
        return super().is_terminal and (self._force_terminal is not None or self.file.isatty())


def _console(*, stderr: bool) -> Console:
    # With NO_COLOR, rich keeps bold and dim unless the colour system is None.
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(
        theme=THEME,
        stderr=stderr,
        highlight=False,
        color_system=None if plain else "auto",
    )


out = _console(stderr=False)
err = _console(stderr=True)


# Pygments styles of code in answers; "": plain text without Markdown.
LOOKS = {"terminal": "ansi_dark", "dark": "monokai", "light": "default", "plain": ""}


def look(name: str) -> str:
    """Return the Pygments style for the name of a theme or of a style. Raises PopError.

    The style is plain if stdout supports no colours or no cursor movement.
    """
    from pygments.styles import get_all_styles

    known = {style: style for style in get_all_styles()} | LOOKS
    if name not in known:
        hint = nearest_hint(name, {style: style for style in known}, "known: " + ", ".join(LOOKS))
        raise PopError(f"unknown theme {name}", hint)
    is_plain = os.environ.get("NO_COLOR") or out.is_dumb_terminal or not out.is_terminal
    return LOOKS["plain"] if is_plain else known[name]


def say(text: str) -> None:
    """Print data on stdout, with control characters escaped only if stdout is a terminal."""
    out.file.write((printable(text, kept="\n") if out.is_terminal else text) + "\n")


def note(message: str) -> None:
    """Print a note on stderr, because stdout is for answers and data."""
    _tell(message, "note")


def warn(message: str) -> None:
    _tell(message, "warn")


def _tell(message: str, style: str) -> None:
    err.print(Text(printable(message), style), soft_wrap=not err.is_terminal)
