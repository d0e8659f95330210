"""Deferred Ctrl-C, which stops work between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """State of Ctrl-C. `asked`: the user pressed it. `at_once`: raise on the next press."""

    def __init__(self) -> None:
        self.asked = self.at_once = False


@contextmanager
def deferred_interrupt() -> Iterator[CtrlC]:
    """Record the first Ctrl-C and raise KeyboardInterrupt only for the second one.

    An exception between a decode and its token count would corrupt the KV cache. A process that
    ignores Ctrl-C, such as a script's background job, continues to ignore it.
    """
    interrupt = CtrlC()
    is_main = threading.current_thread() is threading.main_thread()
    # None means a handler of C code, which Python could not restore.
    if not is_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield interrupt
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if interrupt.asked or interrupt.at_once:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
