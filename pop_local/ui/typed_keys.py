"""Keys typed while the program is busy wait for the next prompt, unseen until then."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

if sys.platform != "win32":
    import termios

# The earlier modes of terminals that do not echo now.
_before: list[list[Any]] = []


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """Keep typed keys out of an answer, which could not be redrawn with them."""
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
    """Undo `unechoed_keys`, unless the terminal is gone or belongs to another program."""
    if sys.platform != "win32" and _before and _is_in_foreground():
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, _before.pop())


def _is_in_foreground() -> bool:
    """Tell whether we may change the terminal: from the background, that stops a program."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False
