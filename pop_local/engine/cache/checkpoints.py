"""Checkpoints of the state that a memory cannot roll back."""

from dataclasses import dataclass

import numpy as np

from pop_local.engine.llama.cells import Cells
from pop_local.engine.llama.context import Context

# A prompt that differs reads up to this number of equal rows again. 1,024 rows are two batches.
EVERY = 1024
# A prompt ends with the start of the answer, which a chat template may change once the answer is
# complete. A checkpoint precedes these rows, where the tail of a pruned prompt starts by default.
END_ROWS = 32
# Each turn adds three checkpoints, so five turns fit before the gaps between older ones grow.
MAX_CHECKPOINTS = 16
# Recurrent states of 24 to 48 layers with 32 heads of 128 x 128 floats take 48 to 96 MiB, so five
# or more checkpoints of such a model fit.
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
