"""Checkpoints of the state that a memory cannot roll back."""

from dataclasses import dataclass

import numpy as np

from pop_local.engine.llama.cells import Cells
from pop_local.engine.llama.context import Context

# A return reads up to this many rows again. One copy takes as long as reading a few rows.
EVERY = 1024
# A prompt's last rows, among them the start of the answer, which a chat template may change once
# the answer is complete. A pruned prompt's tail has the same length, so both end at one chunk.
END_ROWS = 32
# Three checkpoints a turn cover five turns, and the gaps between older ones grow.
MAX_CHECKPOINTS = 16
# Hybrids of 4 to 80 billion parameters have states of 50 to 100 MB: five or more fit.
MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class _Checkpoint:
    """A copy of the state after a sequence's first `n_rows`."""

    n_rows: int
    state: np.ndarray


class Checkpoints:
    """Checkpoints of one sequence, in ascending order of rows.

    `is_needed`: whether the model has recurrent layers, or sliding windows that drop rows. Without
    either, no method copies anything.
    """

    def __init__(self, context: Context, cells: Cells) -> None:
        self.is_needed = context.is_recurrent or context.window > 0
        self._cells = cells
        self._list: list[_Checkpoint] = []

    def __len__(self) -> int:
        return len(self._list)

    @property
    def size_bytes(self) -> int:
        return sum(each.state.size for each in self._list)

    @property
    def last(self) -> int:
        """Number of rows of the last checkpoint, 0 without checkpoints."""
        return self._list[-1].n_rows if self._list else 0

    def best(self, n_rows: int) -> int:
        """Return the number of rows of the last checkpoint within the first `n_rows`, or 0."""
        return max((each.n_rows for each in self._list if each.n_rows <= n_rows), default=0)

    def add(self, n_rows: int) -> None:
        """Copy the state after the first `n_rows`, which are all rows of the sequence."""
        if not self.is_needed or n_rows <= self.last:
            return
        state = self._cells.checkpoint(MAX_BYTES)
        if state is None:
            return
        self._list.append(_Checkpoint(n_rows, state))
        while len(self._list) > MAX_CHECKPOINTS or self.size_bytes > MAX_BYTES:
            del self._list[self._least_useful()]

    def return_to(self, n_rows: int, position: int) -> bool:
        """Restore the checkpoint after `n_rows`, and drop the cells from `position` on.

        The cells are undefined after False.
        """
        found = next(each for each in self._list if each.n_rows == n_rows)
        return self._cells.return_to(found.state, position)

    def drop_after(self, n_rows: int) -> None:
        """Drop the checkpoints of more than `n_rows`, because later rows change."""
        self._list = [each for each in self._list if each.n_rows <= n_rows]

    def _least_useful(self) -> int:
        """Return the index of the checkpoint between the closest neighbours, except the last."""
        rows = [0, *(each.n_rows for each in self._list)]
        gaps = [rows[i + 2] - rows[i] for i in range(len(self._list) - 1)]
        return gaps.index(min(gaps))
