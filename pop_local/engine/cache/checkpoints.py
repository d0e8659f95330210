"""Save and restore checkpoints of states that llama.cpp cannot roll back."""

import numpy as np

from pop_local.engine.llama.slot import Slot

# If a prompt diverges from the cache, up to this many matching rows (two batches) are read again.
EVERY = 1024
# A prompt ends with the start of the answer, which a chat template may change once the answer is
# complete. A checkpoint is taken before these rows, where a pruned prompt's tail starts by default.
END_ROWS = 32
# Each turn adds three checkpoints, so five turns fit before older checkpoints are dropped.
MAX_CHECKPOINTS = 16
# A recurrent layer's state with 32 heads of 128 x 128 floats takes 2 MiB. At least five checkpoints
# of a model with 48 such layers fit.
MAX_BYTES = 512 * 2**20


class Checkpoints:
    """A sequence's checkpoints, in ascending order of row count.

    `is_needed`: whether the model has recurrent layers or windows that drop rows.
    """

    def __init__(self, slot: Slot) -> None:
        self.is_needed = slot.context.is_recurrent or slot.context.window > 0
        self._slot = slot
        self._states: dict[int, np.ndarray] = {}  # by the number of rows that precede them

    def __len__(self) -> int:
        return len(self._states)

    @property
    def size_bytes(self) -> int:
        return sum(state.size for state in self._states.values())

    @property
    def last(self) -> int:
        """Number of rows that the last checkpoint covers, or 0 if there is no checkpoint."""
        return max(self._states, default=0)

    def best(self, n_rows: int) -> int:
        """Return the row count of the last checkpoint within `n_rows` rows, or 0 if none exists."""
        return max((n for n in self._states if n <= n_rows), default=0)

    def add(self, n_rows: int) -> None:
        """Save a checkpoint after `n_rows` rows, unless one already exists."""
        if not self.is_needed or n_rows <= self.last:
            return
        state = self._slot.checkpoint(MAX_BYTES)
        if state is None:
            return
        self._states[n_rows] = state
        while len(self._states) > MAX_CHECKPOINTS or self.size_bytes > MAX_BYTES:
            # Drop the checkpoint between the closest neighbors, but never the last one.
            rows = [0, *self._states]
            gaps = {rows[i]: rows[i + 1] - rows[i - 1] for i in range(1, len(rows) - 1)}
            del self._states[min(gaps, key=gaps.__getitem__)]

    def return_to(self, n_rows: int, position: int) -> bool:
        """Restore the checkpoint taken after `n_rows` rows and drop cells from `position` onward.

        If this method returns False, the cells' contents are undefined.
        """
        return self._slot.return_to(self._states[n_rows], position)

    def drop_after(self, n_rows: int) -> None:
        """Drop all checkpoints beyond the first `n_rows` rows, because later rows will change."""
        self._states = {n: state for n, state in self._states.items() if n <= n_rows}
