"""Keys typed while the program is busy wait for the next prompt, unseen until then."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

if sys.platform != "win32":
    import termios

# How the terminals are that do not echo now.
_before: list[list[Any]] = []


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """The terminal does not write them into an answer, whose lines would not be found again."""
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
    """The terminal as it was before `unechoed_keys`, unless it is gone or someone else's by now."""
    if sys.platform != "win32" and _before and _is_in_foreground():
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, _before.pop())


def _is_in_foreground() -> bool:
    """Whether stdin is a terminal, and ours: changing it from the background stops a program."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False
