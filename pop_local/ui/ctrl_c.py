"""Handle Ctrl-C between two steps of the work."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """`asked`: the user has pressed Ctrl-C. `at_once`: the next Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = self.at_once = False


@contextmanager
def deferred_interrupt() -> Iterator[CtrlC]:
    """Record the first Ctrl-C, and raise KeyboardInterrupt only for the second Ctrl-C.

    An exception between a decode and its token count would corrupt the KV cache. A process that
    ignores Ctrl-C, such as a script's background job, continues to ignore Ctrl-C.
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
