"""Ctrl-C that asks first: the work ends between two steps, not within one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """`asked`: whether Ctrl-C has been pressed; `at_once`: it raises, as at a question."""

    def __init__(self) -> None:
        self.asked = self.at_once = False


@contextmanager
def deferred_interrupt() -> Iterator[CtrlC]:
    """Only remember the first Ctrl-C; a second one raises at once.

    A KV cache must not be cut off between a decode and the count of its tokens. Where Ctrl-C is
    ignored, as in a script's background jobs, it stays ignored.
    """
    interrupt = CtrlC()
    is_main = threading.current_thread() is threading.main_thread()
    # None: handled by something that is not Python's, which could not be put back.
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
