"""While the user types: pruned rows run the skipped layers (/refill), and the model learns."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pop_converter.base.numbers import size
from pop_local.engine.learning.learned_fit import LearnedFit
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.error_output import as_pop_error

MODES = ("idle", "off")


def _learned(chat: Dialogue, should_stop: Callable[[], bool]) -> LearnedFit | None:
    """Go on learning; a failure ends only that."""
    try:
        return chat.teacher.idle(should_stop) if chat.teacher else None
    except Exception as error:
        chat.teacher = None
        chat.screen.warn(f"It learns no longer: {as_pop_error(error).message}.")
        return None


@contextmanager
def idling(chat: Dialogue) -> Iterator[None]:
    """Refill and learn in another thread; leaving waits for a node of a graph, or a solve."""
    stop = threading.Event()
    lessons: list[LearnedFit] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not stop.is_set() and not lessons:
                refills = chat.refill != "off" and chat.model.engine.refiller.n_refillable
                learns = chat.teacher is not None and chat.teacher.has_work
                if not (refills or learns):
                    return
                if refills:
                    chat.model.engine.refiller.refill(stop.is_set)
                elif lesson := _learned(chat, stop.is_set):
                    lessons.append(lesson)
        except Exception as error:  # the conversation goes on
            failures.append(error)

    thread = threading.Thread(target=work, name="pop-local idle", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        _join(thread)
        for error in failures:
            chat.set_refill("off")
            chat.fail(as_pop_error(error))
    for lesson in lessons:
        chat.swap_sidecar(lesson)


def _join(thread: threading.Thread) -> None:
    """Wait for the thread despite Ctrl-C: nobody else may touch the model before."""
    interrupted = False
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt


def set_mode(chat: Dialogue, mode: str) -> None:
    """Obey /refill; alone, it shows how far the cache is exact."""
    if mode and mode not in MODES:
        chat.refuse(f"/refill takes {', '.join(MODES)}, not {mode}.")
        return
    if mode:
        chat.set_refill(mode)
    chat.screen.note(_state(chat))
    if line := status(chat):
        chat.screen.note(line)
        if (
            chat.model.engine.cache.n_exact < chat.model.engine.cache.n_tokens
            and not chat.model.engine.refiller.n_refillable
        ):
            chat.screen.note(
                "They cannot be refilled: they were loaded, or read without keeping their states,"
                " or are of a picture whose tokens see each other."
            )


def finish(chat: Dialogue) -> None:
    """Refill all rows before the cache is saved, unless Ctrl-C ends it."""
    if chat.refill == "off" or not chat.model.engine.refiller.n_refillable:
        return
    try:
        with chat.screen.reading("Refilling") as advance:
            chat.model.engine.refiller.refill(on_progress=advance)
    except KeyboardInterrupt:
        if not chat.screen.is_typed:
            raise
        chat.screen.note("Not refilled to the end.")


def status(chat: Dialogue) -> str:
    """Tell how much of the cache is exact; "" where it is empty, or nothing can be refilled."""
    model = chat.model
    nothing = (
        not model.engine.cache.n_tokens
        or not model.engine.cache.boundary
        or model.engine.context.no_refill
    )
    if chat.refill == "off" or nothing:
        return ""
    cache = model.engine.cache
    return f"{cache.n_exact:,} of {cache.n_tokens:,} tokens are as if read in full"


def _state(chat: Dialogue) -> str:
    if not chat.model.engine.cache.boundary:
        return "There is nothing to refill: this model is not pruned."
    if chat.model.engine.context.no_refill:
        return (
            f"Pruned tokens of this model are not refilled: {chat.model.engine.context.no_refill}."
        )
    if chat.refill == "off":
        return "Refilling is off: pruned tokens stay so."
    held = size(chat.model.engine.refiller.held_bytes)
    return f"Pruned tokens run the skipped layers while you type; their states take {held}."
