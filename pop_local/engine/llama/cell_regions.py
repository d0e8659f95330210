"""Place each sequence's rows in its own blocks of KV cells to make results reproducible.

Attention accumulates values in tiles of 64 cells and chunks of 1,024 cells, and pop-local's kernels
derive a constant from the first two cells. Rounding errors therefore depend on which cells a
sequence uses. A sequence's blocks of 1,024 cells are in ascending order, and the first two cells
never change.

llama.cpp places rows in the lowest empty cells. Sequences without data, called fillers, occupy the
blocks' unused cells. Only the cells reserved for the next batch's rows stay empty.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Reading

BLOCK_CELLS = 1024
# Any two tokens: the constant (attention-unit.h) is K's bias, which all rows have in common.
_FIRST_TOKENS = (0, 1)

# A sequence, the position of its first row, and the number of rows.
Rows = tuple[int, int, int]


def n_cells(n_ctx: int, n_sequences: int) -> int:
    """Return the number of cells that a context needs for sequences of `n_ctx` rows each."""
    n_blocks = 1 + n_sequences * -(-n_ctx // BLOCK_CELLS)
    return n_ctx if n_sequences == 1 else n_blocks * BLOCK_CELLS


def n_all_sequences(n_sequences: int) -> int:
    """Return the number of sequences, including the fillers and the owner of the first block."""
    return 1 if n_sequences == 1 else 2 * n_sequences + 1


class CellRegions:
    """The blocks of cells that a context's sequences own. The caller must hold the context's lock.

    The row at position p of a sequence uses cell p % BLOCK_CELLS of the sequence's block p //
    BLOCK_CELLS. Sequence n + i is sequence i's filler. A filler row occupies each unused cell and
    has the position of the row for which the cell is reserved. `is_on` is False if llama.cpp
    cannot use fillers (for example, with M-RoPE). Without fillers, rows may use any cells.
    """

    def __init__(self, context: Any, n_sequences: int) -> None:
        self._context, self._n = context, n_sequences
        self._api = backend.bindings()
        self._blocks: list[list[int]] = [[] for _ in range(n_sequences)]
        self._n_blocks = 1
        self.is_on = False
        if not context.is_mrope:
            with suppress(PopError):
                self._fill(2 * n_sequences, 0, BLOCK_CELLS)
                self.is_on = True
                self._decode_first_tokens()

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._context.ctx)

    def _decode_first_tokens(self) -> None:
        ctx, owner = self._context.ctx, 2 * self._n
        backend.set_reading(ctx, Reading.SOME)
        backend.set_overwrite(ctx, True)
        self._context.batch.run(ctx, _FIRST_TOKENS, (0, 1), (owner, owner), (False, True))
        backend.set_overwrite(ctx, False)

    def _end(self, sequence: int) -> int:
        return int(self._api.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def _fill(self, sequence: int, first: int, n: int) -> None:
        """Append `n` rows without data to a sequence, using the lowest empty cells."""
        empty = np.full(n, -1, np.int32)
        backend.move_rows(self._context.ctx, sequence, first, empty, np.zeros(n, np.int32))

    @contextmanager
    def placing(self, rows: Sequence[Rows]) -> Iterator[np.ndarray]:
        """Context manager that provides cells for the rows that llama.cpp adds in the `with` block.

        Yields the order in which llama.cpp must add the rows, int64 [n_rows]. If the `with` block
        raises an exception, the rows are dropped. Raises PopError if there are too few cells.
        """
        sizes = [n for _, _, n in rows]
        if not self.is_on:
            yield np.arange(sum(sizes))
            return
        for sequence, first, n in rows:
            while len(self._blocks[sequence]) * BLOCK_CELLS < first + n:
                self._add_block(sequence)
        positions = [np.arange(first, first + n) for _, first, n in rows]
        cells = [
            np.asarray(self._blocks[sequence])[at // BLOCK_CELLS] * BLOCK_CELLS + at % BLOCK_CELLS
            for (sequence, _, _), at in zip(rows, positions, strict=True)
        ]
        order = np.argsort(np.concatenate(cells))
        for sequence, first, n in rows:
            self._api.llama_memory_seq_rm(self._memory, self._n + sequence, first, first + n)
        try:
            yield order
        except BaseException:
            with suppress(PopError):  # another thread is closing the model
                for sequence, first, _ in rows:
                    self._api.llama_memory_seq_rm(self._memory, sequence, first, -1)
                owners = np.repeat([sequence for sequence, _, _ in rows], sizes)
                at = np.concatenate(positions)
                for row in order:
                    self._fill(int(owners[row]), int(at[row]), 1)
                for sequence, first, _ in rows:
                    self.truncate(sequence, first)
            raise

    def truncate(self, sequence: int, first: int) -> bool:
        """Drop a sequence's rows from position `first` onward. Returns False on failure."""
        self.reserve(sequence, first)
        is_done = bool(self._api.llama_memory_seq_rm(self._memory, sequence, first, -1))
        while self._drop_last_block():
            pass
        return is_done

    def reserve(self, sequence: int, first: int) -> None:
        """Reserve the cells from position `first` onward. Call this before dropping the rows."""
        if self.is_on:
            self._api.llama_memory_seq_cp(self._memory, sequence, self._n + sequence, first, -1)

    def _add_block(self, sequence: int) -> None:
        blocks = self._blocks[sequence]
        self._fill(self._n + sequence, len(blocks) * BLOCK_CELLS, BLOCK_CELLS)
        blocks.append(self._n_blocks)
        self._n_blocks += 1

    def _drop_last_block(self) -> bool:
        """Drop the last block if it is unused, so that attention no longer covers its cells."""
        for sequence, blocks in enumerate(self._blocks):
            first = (len(blocks) - 1) * BLOCK_CELLS
            if blocks and blocks[-1] == self._n_blocks - 1 and self._end(sequence) <= first:
                self._api.llama_memory_seq_rm(self._memory, self._n + sequence, first, -1)
                blocks.pop()
                self._n_blocks -= 1
                return True
        return False
