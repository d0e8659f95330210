"""Hide the keys that the user types while the program is busy."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

if sys.platform != "win32":
    import termios

# The terminal's original modes while its echo is off.
_before: list[list[Any]] = []


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """Turn off terminal echo, so that typed keys do not show up in an answer."""
    if sys.platform == "win32" or not _is_in_foreground():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    local_modes = 3
    quiet = [*before]
    quiet[local_modes] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        _before.append(before)
        yield
    finally:
        echo_again()


def echo_again() -> None:
    """Undo `unechoed_keys` if this process still controls the terminal."""
    if sys.platform != "win32" and _before and _is_in_foreground():
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, _before.pop())


def _is_in_foreground() -> bool:
    """Return True if this process may change the terminal."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False
