"""Stopping a long prefill: asked between the nodes of llama.cpp's graph, and between batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .backend import bindings


class PrefillStoppedError(Exception):
    """The caller's `should_stop` said so; what was decoded before stays in the KV cache."""


class Interrupt:
    """Passes Ctrl-C and the caller's wish to stop through llama_decode.

    Python handles a signal only between bytecodes: without a callback, Ctrl-C would wait for the
    end of the batch, which takes a large model on a CPU a minute.
    """

    def __init__(self) -> None:
        self._api = bindings()
        self._callback = self._api.ggml_abort_callback(self._abort)
        self._no_callback = self._api.ggml_abort_callback(0)
        self._raised: BaseException | None = None
        self.should_stop: Callable[[], bool] | None = None

    @contextmanager
    def watching(self, ctx: Any) -> Iterator[None]:
        self._raised = None
        self._api.llama_set_abort_callback(ctx, self._callback, None)
        try:
            yield
        finally:
            self._api.llama_set_abort_callback(ctx, self._no_callback, None)

    def check(self) -> None:
        """To be called after each batch: raises what the callback could not raise."""
        if self._raised is not None:
            raise self._raised
        if self._wanted():
            raise PrefillStoppedError

    def _wanted(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def _abort(self, _data: object) -> bool:
        # ctypes prints and drops what a callback raises, KeyboardInterrupt too.
        try:
            return self._wanted()
        except BaseException as error:
            self._raised = error
            return True
