"""One sequence of a llama_context: its KV cells, batches and logits."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.cells import Cells
from pop_local.engine.llama.context import Context


class Slot(Protocol):
    """One sequence of a context, used by one thread at a time.

    Implementations: SingleSlot, and BatchedSlot (batching.py) for several sequences.
    """

    context: Context
    sequence: int
    cells: Cells

    # Taking turns

    def working(self) -> AbstractContextManager[None]:
        """Make other sequences' batches wait for this sequence's rows until exit."""

    def locked(self) -> AbstractContextManager[None]:
        """Prevent other threads from changing the cells until exit."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Run this sequence's batches immediately and block the others until exit."""

    def interruptible(self) -> AbstractContextManager[None]:
        """Let the caller's `should_stop` abort batches until exit (see Interrupt)."""

    def raise_if_stopped(self) -> None:
        """Raise the reason if the last batch was aborted (see Interrupt.check)."""

    def require_idle(self) -> None:
        """Raise PopError if called from a callback within a batch."""

    # Batches

    @property
    def mode(self) -> Mode:
        """The mode in which rows are computed."""

    def set_mode(self, mode: Mode) -> None:
        """Switch the mode. Raises PopError for a mode that the model lacks."""

    def begin_prefill(self) -> None:
        """Mark the following batches as prefill, and reset the counters."""

    def begin_decode(self) -> None:
        """Mark the following batches as decode, not prefill."""

    @property
    def counters(self) -> Counters:
        """Rows computed since `begin_prefill`."""

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        """Run rows in full below `sink_tokens`, and from position `full_from` on (-1: none)."""

    def set_deep_rows(self, positions: np.ndarray) -> None:
        """Run the next batch's rows at these ascending positions in full.

        Replaces the positions of an earlier call.
        """

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        """Decode tokens at consecutive positions.

        Raises PopError if llama.cpp refuses them, and StoppedError or the signal handler's
        exception if interrupted.
        """

    def overwriting(self) -> AbstractContextManager[None]:
        """Let `decode` compute rows that have cells in place until exit."""

    @property
    def logits(self) -> np.ndarray:
        """Logits of the last row with outputs, float32 [n_vocab], valid until the next batch."""

    def run_deep(self, positions: np.ndarray) -> bool:
        """Run a deep pass over rows (see backend.run_deep)."""


class SingleSlot:
    """The only sequence of a context."""

    sequence = 0

    def __init__(self, context: Context) -> None:
        self.context = context
        self.cells = Cells(context)
        self._api = backend.bindings()

    @property
    def _ctx(self) -> Any:
        return self.context.ctx

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    locked = exclusive = working

    def interruptible(self) -> AbstractContextManager[None]:
        return self.context.interrupt.watching(self._ctx)

    def raise_if_stopped(self) -> None:
        self.context.interrupt.check()

    def require_idle(self) -> None:
        self.context.interrupt.require_idle()

    @property
    def mode(self) -> Mode:
        return backend.get_mode(self._ctx)

    def set_mode(self, mode: Mode) -> None:
        backend.set_mode(self._ctx, mode)

    def begin_prefill(self) -> None:
        backend.reset_counters(self._ctx)
        backend.set_reading(self._ctx, Reading.SOME)

    def begin_decode(self) -> None:
        backend.set_reading(self._ctx, Reading.NONE)

    @property
    def counters(self) -> Counters:
        return backend.get_counters(self._ctx)

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        backend.set_sink(self._ctx, sink_tokens)
        backend.set_full_from(self._ctx, self.sequence, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        backend.set_deep_rows(self._ctx, self.sequence, positions)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        decode_now(self.context, self.sequence, tokens, first_position, outputs)

    def overwriting(self) -> AbstractContextManager[None]:
        return overwriting(self._ctx)

    @property
    def logits(self) -> np.ndarray:
        return last_logits(self.context)

    def run_deep(self, positions: np.ndarray) -> bool:
        return backend.run_deep(self._ctx, self.sequence, positions)


def decode_now(
    context: Context, sequence: int, tokens: Sequence[int], first_position: int, outputs: Outputs
) -> None:
    """Decode tokens as one batch (see Slot.decode)."""
    logs.forget_errors()
    code = context.batch.decode(context.ctx, tokens, first_position, outputs, sequence)
    if code != 0:
        context.interrupt.check()
        raise logs.not_decoded(code)


@contextmanager
def overwriting(ctx: Any) -> Iterator[None]:
    """Let batches overwrite rows until exit (see backend.set_overwrite)."""
    backend.set_overwrite(ctx, True)
    try:
        yield
    finally:
        backend.set_overwrite(ctx, False)


def last_logits(context: Context) -> np.ndarray:
    """Return the last row's logits, float32 [n_vocab], valid until the next batch."""
    row = backend.bindings().llama_get_logits_ith(context.ctx, -1)
    return np.ctypeslib.as_array(row, (context.vocabulary.n_tokens,))
