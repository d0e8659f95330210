"""Background work while the user types: refilling the cache."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.error_output import as_pop_error


@contextmanager
def idling(chat: Dialogue) -> Iterator[None]:
    """Refill the cache in another thread until the block ends."""
    stop = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            refiller = chat.model.engine.sequences[0].refiller
            if chat.refill != "off" and refiller.n_refillable:
                refiller.refill(stop.is_set)
        except Exception as error:  # an error must not end the conversation
            failures.append(error)

    thread = threading.Thread(target=work, name="pop-local idle", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        _join(thread)
        for error in failures:
            chat.refill = "off"
            chat.model.engine.set_refill(False)
            chat.fail(as_pop_error(error))


def _join(thread: threading.Thread) -> None:
    """Wait for the thread even after Ctrl-C, because the thread may still be using the model."""
    interrupted = False
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt


def status(chat: Dialogue) -> str:
    """State how many of the conversation's cached tokens are exact.

    Return "" if refilling is off or impossible, or if the conversation is empty.
    """
    engine = chat.model.engine
    can_refill = engine.sequences[0].settings.boundary and not engine.context.files.no_refill
    if chat.refill == "off" or not can_refill or not chat.session.last_asked:
        return ""
    cache = engine.sequences[0].cache
    return f"Cache: {cache.n_exact:,} of {cache.n_tokens:,} tokens have exact values"
