"""One sequence of a llama_context: its KV cells, batches, and logits."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
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

    BatchedSlot, in batching.py, is a slot for one of several sequences. Saved states of an only
    sequence contain the whole context, including rows outside the sliding window.
    """

    _starts_with_size = True  # whether states start with the size of the architecture's name

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.context, self.sequence = context, sequence
        self._api = backend.bindings()
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

    # Cells

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self.context.ctx)

    @property
    def end_position(self) -> int:
        """The position after the last cell."""
        with self.locked():
            if not (memory := self._memory):
                return 0
            return int(self._api.llama_memory_seq_pos_max(memory, self.sequence)) + 1

    @property
    def first_position(self) -> int:
        with self.locked():
            return int(self._api.llama_memory_seq_pos_min(self._memory, self.sequence))

    def truncate(self, position: int) -> bool:
        """Drop the cells from `position` onward. Returns False on failure."""
        with self.locked():
            if self.end_position <= position:
                return True
            return bool(self._api.llama_memory_seq_rm(self._memory, self.sequence, position, -1))

    def clear(self) -> None:
        """Drop all cells, including those restored from a saved state."""
        if memory := self._memory:
            self._api.llama_memory_clear(memory, True)

    def share(self, other: "Slot", n_positions: int, tokens: np.ndarray) -> bool:
        """Copy another sequence's first rows to this empty sequence. `tokens`: int32 [n_rows].

        Returns False if llama.cpp cannot copy rows, so the sequences share cells.
        """
        with self.locked():
            copy = self._api.llama_memory_seq_cp
            copy(self._memory, other.sequence, self.sequence, 0, n_positions)
            if self.context.is_mrope:
                return False
            try:
                self.move_rows(0, np.arange(n_positions, dtype=np.int32), tokens)
            except PopError:
                return False
            return True

    def move_rows(self, start: int, sources: np.ndarray, tokens: np.ndarray) -> None:
        """Replace the cells from `start` onward (see backend.move_rows)."""
        with self.locked():
            backend.move_rows(self.context.ctx, self.sequence, start, sources, tokens)

    def state_size(self) -> int:
        """Return the maximum size of the saved state in bytes."""
        with self.locked():
            return self._state("get_size")

    def state(self) -> bytes:
        """Return the cells' state in llama.cpp's format."""
        with self.locked():
            buffer = np.empty(self._state("get_size"), dtype=np.uint8)
            n_read = self._state("get_data", _address(buffer), buffer.size)
            return buffer[:n_read].tobytes()

    def restore(self, state: bytes) -> bool:
        """Restore the cells from a saved state. Returns False on failure.

        After a failure, the cells' contents are undefined. Rejects states that are empty or shorter
        than their declared size.
        """
        size = int.from_bytes(state[:4], "little") if self._starts_with_size else 0
        if not state or size > len(state):
            return False
        buffer = np.frombuffer(state, dtype=np.uint8)
        with self.locked():
            return self._state("set_data", _address(buffer), buffer.size) == buffer.size

    def checkpoint(self, max_bytes: int) -> np.ndarray | None:
        """Return a copy of the recurrent states and of the rows in sliding windows.

        Returns uint8 [n_bytes] in llama.cpp's format. Returns None if llama.cpp fails to copy the
        data, or if the copy would be empty or too large.
        """
        api, flags = self._api, self._api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        with self.locked():
            ctx, sequence = self.context.ctx, self.sequence
            n_bytes = int(api.llama_state_seq_get_size_ext(ctx, sequence, flags))
            if not 0 < n_bytes <= max_bytes:
                return None
            state, get = np.empty(n_bytes, np.uint8), api.llama_state_seq_get_data_ext
            return state if get(ctx, _address(state), n_bytes, sequence, flags) == n_bytes else None

    def return_to(self, checkpoint: np.ndarray, position: int) -> bool:
        """Restore a checkpoint and then drop all cells from `position` onward.

        Returns False on failure, which leaves the cells' contents undefined.
        """
        api, flags = self._api, self._api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        n_bytes, put = checkpoint.size, api.llama_state_seq_set_data_ext
        with self.locked():
            n_read = put(self.context.ctx, _address(checkpoint), n_bytes, self.sequence, flags)
            return n_read == n_bytes and bool(
                api.llama_memory_seq_rm(self._memory, self.sequence, position, -1)
            )

    def _state(self, action: str, *values: Any) -> int:
        """Call a llama_state_* function. Returns the number of bytes."""
        return int(getattr(self._api, f"llama_state_{action}")(self.context.ctx, *values))


def _address(buffer: np.ndarray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
