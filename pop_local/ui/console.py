"""The consoles: `out` for answers and data, `err` for all other output."""

import os
import unicodedata

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

THEME = Theme(
    {
        "error": "bold red",
        "hint": "cyan",
        "note": "dim",
        "good": "green",
        "bad": "bold red",
        "warn": "yellow",
        "title": "bold",
        "bar.complete": "cyan",
        "bar.finished": "green",
    }
)
# Control and format characters, surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Console(Console):
    @property
    def is_terminal(self) -> bool:
        """Return False for a pipe, even if FORCE_COLOR or TTY_COMPATIBLE is set."""
        return super().is_terminal and (self._force_terminal is not None or self.file.isatty())

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as print() does. By default, rich exits with code 1."""
        raise BrokenPipeError


def _console(*, stderr: bool) -> Console:
    # With NO_COLOR, rich keeps bold and dim unless the color system is None.
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(
        theme=THEME, stderr=stderr, highlight=False, color_system=None if plain else "auto"
    )


out = _console(stderr=False)
err = _console(stderr=True)


def printable(text: str, *, kept: str = "") -> str:
    """Escape all characters that control a terminal or cannot be encoded. Leave `kept` unchanged.

    Names, metadata, and error messages from files and servers are untrusted text.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE and char not in kept
        else char
        for char in text
    )


def say(text: str) -> None:
    """Print data to stdout. Escape control characters only if stdout is a terminal."""
    out.file.write((printable(text, kept="\n") if out.is_terminal else text) + "\n")


def note(message: str, style: str = "note") -> None:
    """Print a note to stderr, because stdout is for answers and data."""
    err.print(Text(printable(message), style), soft_wrap=not err.is_terminal)


def warn(message: str) -> None:
    note(message, "warn")
