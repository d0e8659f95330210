"""The one theme and the two consoles: answers and data on `out`, everything else on `err`."""

import os

from rich.console import Console
from rich.theme import Theme

THEME = Theme(
    {
        "error": "bold red",
        "hint": "cyan",
        "note": "dim",
        "stat": "dim",
        "good": "green",
        "bad": "bold red",
        "warn": "yellow",
        "title": "bold",
        "prompt": "bold cyan",
        "bar.complete": "cyan",
        "bar.finished": "green",
    }
)


def _console(*, stderr: bool) -> Console:
    # rich drops only the colours for NO_COLOR; without a colour system bold and dim go as well.
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        theme=THEME,
        stderr=stderr,
        highlight=False,
        color_system=None if plain else "auto",
    )


out = _console(stderr=False)
err = _console(stderr=True)


def note(message: str) -> None:
    """One line of what is going on, on stderr."""
    err.print(message, style="note", markup=False, soft_wrap=not err.is_terminal)


def warn(message: str) -> None:
    """One line that the user should not miss, on stderr."""
    err.print(message, style="warn", markup=False, soft_wrap=not err.is_terminal)
