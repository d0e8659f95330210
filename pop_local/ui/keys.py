"""Keys typed while the program is busy wait for the next prompt, unseen until then."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

if sys.platform != "win32":
    import termios


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
        yield
    finally:
        # The terminal may be gone by now, or someone else's.
        if _is_in_foreground():
            with suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _is_in_foreground() -> bool:
    """Whether stdin is a terminal, and ours: changing it from the background stops a program."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False
