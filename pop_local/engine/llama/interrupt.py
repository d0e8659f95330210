"""Interrupt prefill between graph nodes or between batches."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from pop_base.errors import PopError, StoppedError
from pop_local.engine.llama.backend import bindings

# A context variable, because each thread has a different caller.
_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]


@contextmanager
def stopped_by(should_stop: Callable[[], bool] | None) -> Iterator[None]:
    """Context manager that lets `should_stop`, if given, stop this thread's batches."""
    token = _should_stop.set(should_stop or _should_stop.get())
    try:
        yield
    finally:
        _should_stop.reset(token)


def current_should_stop() -> Callable[[], bool]:
    """Return the calling thread's `should_stop`, for use in another thread."""
    return _should_stop.get()


class DisplacedError(PopError):
    """Error raised when the KV cache is emptied or overwritten before an answer ends."""

    def __init__(self) -> None:
        super().__init__(
            "the KV cache was emptied, or another answer started, before this answer ended",
            "read each answer to the end, or close its iterator, before asking the next question",
        )


class Interrupt:
    """An abort callback that stops llama_decode on a signal or when `should_stop` returns True.

    Python handles signals only between bytecodes, so Ctrl-C would otherwise have no effect until
    the batch ends. Exceptions cannot propagate through ctypes, so signal handlers are deferred.
    The thread that uses the context holds `lock`.
    """

    def __init__(self) -> None:
        self._api = bindings()
        self._callback = self._api.ggml_abort_callback(lambda _: self.should_stop())
        self._no_callback = self._api.ggml_abort_callback(0)
        self._raised: BaseException | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        self.lock = threading.RLock()
        self._is_watching = False
        self._in_callback = False
        self._on_exit: Callable[[], None] | None = None
        self._n_stopping = 0

    @contextmanager
    def watching(self, ctx: Any) -> Iterator[None]:
        """Context manager that installs the abort callback on a llama_context."""
        if self._is_watching:  # nested: a progress callback uses the same model
            try:
                yield
            finally:
                self._raised = None
            return
        with self._deferred_signals():
            self._api.llama_set_abort_callback(ctx, self._callback, None)
            self._is_watching = True
            try:
                yield
            finally:
                self._is_watching = False
                self._api.llama_set_abort_callback(ctx, self._no_callback, None)
                self._raised = None
                on_exit, self._on_exit = self._on_exit, None
                if on_exit is not None:
                    on_exit()

    @contextmanager
    def opening(self, model_params: Any) -> Iterator[None]:
        """Let a signal or `should_stop` abort model loading (llama_progress_callback).

        If loading is aborted, llama.cpp reports a failure. Deferred signal handlers run on exit.
        """
        should_stop = current_should_stop()
        callback = self._api.llama_progress_callback(
            lambda *_: not (self._pending or should_stop())
        )
        model_params.progress_callback = callback
        with self._deferred_signals():
            yield

    @contextmanager
    def tokenizing(self) -> Iterator[Any]:
        """Yield a callback for llama_pop_tokenize. On exit, raise the callback's exception."""
        with self._deferred_signals():
            yield self._callback
            if self._raised is not None:
                raise self._raised

    @contextmanager
    def stopped(self, work: Callable[[], None]) -> Iterator[bool]:
        """Context manager that stops the running batch and blocks other threads' batches.

        Yields False if this thread is running the batch. `watching` then calls `work` on exit.
        """
        self._n_stopping += 1
        with self.lock:
            self._n_stopping -= 1
            if self._is_watching:
                self._on_exit = work
            yield not self._is_watching

    def require_idle(self) -> None:
        """Raise PopError if called from a callback during a batch."""
        if self._in_callback:
            raise PopError(
                "the model was called from a callback during a batch",
                "call the model again after this answer ends",
            )

    def check(self) -> None:
        """Raise the last batch's exception, if any. Call this method after each batch.

        Raises StoppedError if `should_stop` returned True. Decoded rows stay cached.
        """
        if self._raised is not None:
            raise self._raised
        self._deliver()
        if self._stop_requested():
            raise StoppedError

    def should_stop(self) -> bool:
        """Return True if the batch must stop. The next `check` then raises an exception."""
        if self._raised is None:
            self._in_callback = True
            try:
                self._deliver()
                if self._stop_requested():  # stored, since the next should_stop() may return False
                    self._raised = StoppedError()
            except BaseException as error:
                self._raised = error
            finally:
                self._in_callback = False
        return self._raised is not None

    @contextmanager
    def _deferred_signals(self) -> Iterator[None]:
        """Context manager that defers the main thread's signal handlers until exit."""
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

    def _stop_requested(self) -> bool:
        return self._on_exit is not None or self._n_stopping > 0 or current_should_stop()()
