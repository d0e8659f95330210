"""Keys typed while the program is busy wait for the next prompt, unseen until then."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform != "win32":
    import termios


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """The terminal does not write them into an answer, whose lines would not be found again."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    local_modes = 3
    quiet = [*before]
    quiet[local_modes] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
