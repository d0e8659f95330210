"""A sequence's KV cells in llama.cpp's memory."""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.context import Context

Lock = Callable[[], AbstractContextManager[None]]


class Cells:
    """The KV cells of a context's only sequence.

    Saved states contain the whole context, including rows outside the sliding window.
    """

    _starts_with_size = True  # of the architecture's name

    def __init__(self, context: Context, sequence: int = 0, locked: Lock = nullcontext) -> None:
        """`locked` returns a context manager that keeps other threads from changing the cells."""
        self._context, self._sequence, self._locked = context, sequence, locked
        self._api = backend.bindings()

    @property
    def _ctx(self) -> Any:
        return self._context.ctx

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._ctx)

    @property
    def end(self) -> int:
        """The position after the last cell."""
        with self._locked():
            if not (memory := self._memory):
                return 0
            return int(self._api.llama_memory_seq_pos_max(memory, self._sequence)) + 1

    @property
    def first(self) -> int:
        """The first cell's position."""
        with self._locked():
            return int(self._api.llama_memory_seq_pos_min(self._memory, self._sequence))

    def truncate(self, position: int) -> bool:
        """Drop the cells from `position` onward. Returns False on failure."""
        with self._locked():
            if self.end <= position:
                return True
            return bool(self._api.llama_memory_seq_rm(self._memory, self._sequence, position, -1))

    def clear(self) -> None:
        """Drop all cells, including those restored from a saved state."""
        if memory := self._memory:
            self._api.llama_memory_clear(memory, True)

    def share(self, other: "Cells", n_positions: int, tokens: np.ndarray) -> bool:
        """Copy another sequence's first rows to this empty sequence. `tokens`: int32 [n_rows].

        Returns False if llama.cpp cannot copy rows, so the sequences share cells.
        """
        with self._locked():
            copy = self._api.llama_memory_seq_cp
            copy(self._memory, other._sequence, self._sequence, 0, n_positions)
            if self._context.is_mrope:
                return False
            try:
                self.move(0, np.arange(n_positions, dtype=np.int32), tokens)
            except PopError:
                return False
            return True

    def move(self, start: int, sources: np.ndarray, tokens: np.ndarray) -> None:
        """Replace the cells from `start` onward with an edited prompt's cells (see move_rows)."""
        with self._locked():
            backend.move_rows(self._ctx, self._sequence, start, sources, tokens)

    def state_size(self) -> int:
        """Return the maximum size of the saved state in bytes."""
        with self._locked():
            return self._state("get_size")

    def state(self) -> bytes:
        """Return the cells' state in llama.cpp's format."""
        with self._locked():
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
        with self._locked():
            return self._state("set_data", _address(buffer), buffer.size) == buffer.size

    def checkpoint(self, max_bytes: int) -> np.ndarray | None:
        """Return a copy of the recurrent states and of the rows in sliding windows.

        Returns uint8 [n_bytes] in llama.cpp's format. Returns None if llama.cpp fails to copy the
        data, or if the copy would be empty or too large.
        """
        api, flags = self._api, self._api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        with self._locked():
            n_bytes = int(api.llama_state_seq_get_size_ext(self._ctx, self._sequence, flags))
            if not 0 < n_bytes <= max_bytes:
                return None
            state, get = np.empty(n_bytes, np.uint8), api.llama_state_seq_get_data_ext
            n_read = get(self._ctx, _address(state), n_bytes, self._sequence, flags)
            return state if n_read == n_bytes else None

    def return_to(self, checkpoint: np.ndarray, position: int) -> bool:
        """Restore a checkpoint and then drop all cells from `position` onward.

        Returns False on failure, which leaves the cells' contents undefined.
        """
        api, flags = self._api, self._api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        n_bytes, put = checkpoint.size, api.llama_state_seq_set_data_ext
        with self._locked():
            n_read = put(self._ctx, _address(checkpoint), n_bytes, self._sequence, flags)
            return n_read == n_bytes and bool(
                api.llama_memory_seq_rm(self._memory, self._sequence, position, -1)
            )

    def _state(self, action: str, *values: Any) -> int:
        """Call a llama_state_* function. Returns the number of bytes."""
        call = getattr(self._api, f"llama_state_{action}")
        return int(call(self._ctx, *values))


class SequenceCells(Cells):
    """A sequence's KV cells in a shared context. Each saved state contains a single sequence."""

    _starts_with_size = False

    def clear(self) -> None:
        self.truncate(0)

    def _state(self, action: str, *values: Any) -> int:
        call = getattr(self._api, f"llama_state_seq_{action}")
        return int(call(self._ctx, *values, self._sequence))


def _address(buffer: np.ndarray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
