"""Idle work while the user types: refilling the cache (/refill) and learning."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pop_converter.base.numbers import size
from pop_local.engine.learning.learned_fit import LearnedFit
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.error_output import as_pop_error

MODES = ("idle", "off")


def _learned(chat: Dialogue, should_stop: Callable[[], bool]) -> LearnedFit | None:
    """Continue learning; a failure only turns learning off."""
    try:
        return chat.teacher.idle(should_stop) if chat.teacher else None
    except Exception as error:
        chat.teacher = None
        chat.screen.warn(f"Learning is off: {as_pop_error(error).message}.")
        return None


@contextmanager
def idling(chat: Dialogue) -> Iterator[None]:
    """Refill and learn in another thread, which stops at the end of the block."""
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
        except Exception as error:  # keep the conversation alive
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
            chat.fail(as_pop_error(error))
    for lesson in lessons:
        chat.swap_sidecar(lesson)


def _join(thread: threading.Thread) -> None:
    """Wait for the thread despite Ctrl-C, since it owns the model."""
    interrupted = False
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt


def set_mode(chat: Dialogue, mode: str) -> None:
    """Run /refill; without a mode, show the progress."""
    if mode and mode not in MODES:
        chat.refuse(f"/refill accepts {' or '.join(MODES)}, not {mode}.")
        return
    if mode:
        chat.refill = mode
    chat.screen.note(_state(chat))
    if line := status(chat):
        chat.screen.note(line)
        if (
            chat.model.engine.cache.n_exact < chat.model.engine.cache.n_tokens
            and not chat.model.engine.refiller.n_refillable
        ):
            chat.screen.note(
                "The others stay pruned: they were loaded, were read while catching up was off, or"
                " belong to a picture."
            )


def finish(chat: Dialogue) -> None:
    """Refill all rows before the cache is saved, until Ctrl-C."""
    if chat.refill == "off" or not chat.model.engine.refiller.n_refillable:
        return
    try:
        with chat.screen.reading("Catching up") as advance:
            chat.model.engine.refiller.refill(on_progress=advance)
    except KeyboardInterrupt:
        if not chat.screen.is_typed:
            raise
        chat.screen.note("Stopped before all tokens were exact.")


def status(chat: Dialogue) -> str:
    """Return the share of exact tokens; "" for an empty cache or without refilling."""
    model = chat.model
    nothing = (
        not model.engine.cache.n_tokens
        or not model.engine.pruning.boundary
        or model.engine.context.no_refill
    )
    if chat.refill == "off" or nothing:
        return ""
    cache = model.engine.cache
    return f"Cache: {cache.n_exact:,} of {cache.n_tokens:,} tokens exact"


def _state(chat: Dialogue) -> str:
    if not chat.model.engine.pruning.boundary:
        return "Nothing to catch up: this model is not pruned."
    if chat.model.engine.context.no_refill:
        return f"Pruned tokens cannot catch up: {chat.model.engine.context.no_refill}."
    if chat.refill == "off":
        return "Catching up is off: pruned tokens stay pruned."
    held = size(chat.model.engine.refiller.held_bytes)
    return f"Catching up is on: pruned tokens run the skipped layers while you type ({held})."
