"""Defer Ctrl-C until the current step is finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """Flags. `asked` is true after Ctrl-C. If `at_once` is true, Ctrl-C raises an error."""

    def __init__(self) -> None:
        self.asked = self.at_once = False


@contextmanager
def deferred_interrupt() -> Iterator[CtrlC]:
    """Record the first Ctrl-C, and raise KeyboardInterrupt on the second.

    An exception between a decode and its bookkeeping would corrupt the KV cache. If the process
    already ignores Ctrl-C (as a shell script's background job does), the function changes nothing.
    """
    interrupt = CtrlC()
    is_main = threading.current_thread() is threading.main_thread()
    # None means that C code installed the handler, so Python could not restore it.
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
