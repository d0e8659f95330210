"""Stopping a long prefill: asked between the nodes of llama.cpp's graph, and between batches."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from pop_converter.base.errors import PopError, StoppedError
from pop_local.engine.llama.backend import bindings

# For the work of this thread alone.
_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]


@contextmanager
def stopped_by(should_stop: Callable[[], bool] | None) -> Iterator[None]:
    """Ask this for a while; without one, whoever might stop it before still may."""
    token = _should_stop.set(should_stop or _should_stop.get())
    try:
        yield
    finally:
        _should_stop.reset(token)


def whether_to_stop() -> Callable[[], bool]:
    """Return what `stopped_by` asks now, for another thread that works for this one."""
    return _should_stop.get()


class DisplacedError(PopError):
    """Another prompt has taken the KV cache of an answer."""

    def __init__(self) -> None:
        super().__init__(
            "the KV cache was emptied, or another answer begun, before this one had ended",
            "a model gives one answer at a time: read it to its end, or close it",
        )


class Interrupt:
    """Passes signals (Ctrl-C) and the caller's wish to stop through llama_decode.

    Python handles signals only between bytecodes: without a callback, Ctrl-C would wait for the
    end of the batch. ctypes drops what a callback raises, so handlers are put off.
    """

    def __init__(self) -> None:
        self._api = bindings()
        self._callback = self._api.ggml_abort_callback(lambda _: self.is_wanted())
        self._no_callback = self._api.ggml_abort_callback(0)
        self._raised: BaseException | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        self._is_watching = False
        self._is_asking = False
        self._at_end: Callable[[], None] | None = None

    @contextmanager
    def watching(self, ctx: Any) -> Iterator[None]:
        if self._is_watching:  # whoever is told how far a prefill is asks the same model
            try:
                yield
            finally:
                self._raised = None
            return
        with self._signals_put_off():
            self._api.llama_set_abort_callback(ctx, self._callback, None)
            self._is_watching = True
            try:
                yield
            finally:
                self._is_watching = False
                self._api.llama_set_abort_callback(ctx, self._no_callback, None)
                self._raised = None
                at_end, self._at_end = self._at_end, None
                if at_end is not None:
                    at_end()

    @contextmanager
    def opening(self, model_params: Any) -> Iterator[None]:
        """Stop the loading of a model (llama_progress_callback) at a signal, and handle it then.

        The caller's wish to stop ends it as well; the model cannot be opened then.
        """
        should_stop = whether_to_stop()
        callback = self._api.llama_progress_callback(
            lambda *_: not (self._pending or should_stop())
        )
        model_params.progress_callback = callback
        with self._signals_put_off():
            yield

    @contextmanager
    def tokenizing(self) -> Iterator[Any]:
        """Yield the callback that stops llama_pop_tokenize, and raise why it did."""
        with self._signals_put_off():
            yield self._callback
            if self._raised is not None:
                raise self._raised

    def postponed(self, work: Callable[[], None]) -> bool:
        """Whether llama.cpp computes now: it is stopped then, and `work` is done at its end."""
        if self._is_watching:
            self._at_end = work
        return self._is_watching

    def require_idle(self) -> None:
        """Raises PopError for whoever is asked whether to stop, in the midst of a batch."""
        if self._is_asking:
            raise PopError(
                "the model computes, and only waits to hear whether it should stop",
                "ask it for more once this answer has ended",
            )

    def check(self) -> None:
        """To be called after each batch: raises what the callback could not raise.

        That is StoppedError where the caller wished so; what was decoded before stays cached.
        """
        if self._raised is not None:
            raise self._raised
        self._deliver()
        if self._wanted():
            raise StoppedError

    def is_wanted(self) -> bool:
        """Whether to stop, for whatever runs between two batches; `check` then says why."""
        if self._raised is None:
            self._is_asking = True
            try:
                self._deliver()
                if self._wanted():  # which need not be said again
                    self._raised = StoppedError()
            except BaseException as error:
                self._raised = error
            finally:
                self._is_asking = False
        return self._raised is not None

    @contextmanager
    def _signals_put_off(self) -> Iterator[None]:
        """Handle signals at the end; of the main thread alone, as Python does."""
        self._pending.clear()
        self._handlers.clear()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, lambda *received: self._pending.append(received))
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._deliver()

    def _deliver(self) -> None:
        while self._pending:
            number, frame = self._pending.pop(0)
            self._handlers[number](number, frame)

    def _wanted(self) -> bool:
        return self._at_end is not None or whether_to_stop()()
