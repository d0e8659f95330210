"""One sequence of a llama_context: its KV cells, batches, and logits."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.cells import Cells
from pop_local.engine.llama.context import Context


@contextmanager
def overwriting(ctx: Any) -> Iterator[None]:
    """Context manager that lets batches overwrite rows that already have cells."""
    backend.set_overwrite(ctx, True)
    try:
        yield
    finally:
        backend.set_overwrite(ctx, False)


class Slot:
    """A slot for a context's only sequence.

    BatchedSlot, in batching.py, is a slot for one of several sequences.
    """

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.context, self.sequence = context, sequence
        self.cells = Cells(context, locked=context.locked)
        self._n_outputs = 0

    # Taking turns

    def working(self, *, pauses: bool = False) -> AbstractContextManager[None]:
        """Context manager that makes other sequences' batches wait for this sequence's rows.

        If `pauses` is True, other batches do not wait for this sequence's rows.
        """
        return nullcontext()

    def locked(self) -> AbstractContextManager[None]:
        """Context manager that keeps other threads from changing the cells."""
        return self.context.locked()

    def exclusive(self) -> AbstractContextManager[None]:
        """Context manager during which only this sequence's batches run, each one immediately."""
        return self.context.locked()

    def interruptible(self) -> AbstractContextManager[None]:
        """Context manager that lets the caller's `should_stop` abort batches (see Interrupt)."""
        return self.context.interrupt.watching(self.context.ctx)

    def raise_if_stopped(self) -> None:
        """Raise the exception that aborted the last batch, if any (see Interrupt.check)."""
        self.context.interrupt.check()

    def require_idle(self) -> None:
        """Raise PopError if called from a callback during a batch."""
        self.context.interrupt.require_idle()

    # Batches

    @property
    def mode(self) -> Mode:
        """The pruning mode in which rows are computed."""
        return backend.get_mode(self.context.ctx)

    def set_mode(self, mode: Mode) -> None:
        """Switch the mode. Raises PopError if the model does not support the mode."""
        backend.set_mode(self.context.ctx, mode)

    def begin_prefill(self) -> None:
        """Mark all subsequent batches as prefill batches and reset the counters."""
        backend.reset_counters(self.context.ctx)
        backend.set_reading(self.context.ctx, Reading.SOME)

    def begin_decode(self) -> None:
        """Mark all subsequent batches as decode batches."""
        backend.set_reading(self.context.ctx, Reading.NONE)

    @property
    def counters(self) -> Counters:
        """Counts of the rows computed since `begin_prefill`."""
        return backend.get_counters(self.context.ctx)

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        """Run the first `sink_tokens` rows and those from `full_from` onward through all layers."""
        backend.set_sink(self.context.ctx, sink_tokens)
        backend.set_full_from(self.context.ctx, self.sequence, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        """Set the positions of the next batch's deep rows, in ascending order."""
        backend.set_deep_rows(self.context.ctx, self.sequence, positions)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        """Decode tokens at consecutive positions.

        Raises PopError if llama.cpp rejects the tokens. If decoding is interrupted, raises
        StoppedError or the signal handler's exception.
        """
        context = self.context
        logs.forget_errors()
        self._n_outputs = int(outputs.mask(len(tokens)).sum())
        code = context.batch.decode(context.ctx, tokens, first_position, outputs, self.sequence)
        if code != 0:
            context.interrupt.check()
            raise logs.not_decoded(code)

    def overwriting(self) -> AbstractContextManager[None]:
        """Context manager that lets `decode` overwrite rows that already have cells."""
        return overwriting(self.context.ctx)

    @property
    def logits(self) -> np.ndarray:
        """Logits of the last call's output rows, float32 [n_outputs, n_vocab].

        The array is valid until the next batch.
        """
        return self.context.logits(self._n_outputs)

    def run_deep(self, positions: np.ndarray) -> bool:
        """Run the skipped layers for the rows at `positions` (see backend.run_deep)."""
        return backend.run_deep(self.context.ctx, self.sequence, positions)
