"""A llama_batch that is filled through numpy views."""

import ctypes
from collections.abc import Sequence
from enum import Enum

import numpy as np

from pop_local.engine.llama.backend import bindings

Tokens = Sequence[int] | np.ndarray


class Outputs(Enum):
    """The batch rows for which logits are computed."""

    NONE = "none"
    LAST = "last"
    ALL = "all"

    def mask(self, n: int) -> np.ndarray:
        """Return True for each of `n` rows that needs logits, bool [n]."""
        rows = np.full(n, self is Outputs.ALL)
        rows[-1] = self is not Outputs.NONE
        return rows


def decode_rows(
    ctx: object,
    rows: np.ndarray,
    positions: np.ndarray,
    *,
    sequence: int = 0,
    is_mutual: bool = False,
) -> int:
    """Decode rows of embeddings without computing logits. Returns llama_decode's code.

    `rows`: float32 [n, n_embd_inp]. `positions`: int32 [n_pos, n]. `is_mutual`: whether all rows
    attend to each other.
    """
    api = bindings()
    rows, positions = np.ascontiguousarray(rows), np.ascontiguousarray(positions)
    batch = api.llama_batch_init(positions.size, rows.shape[1], 1)  # room for all positions
    try:
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        ctypes.memmove(batch.pos, positions.ctypes.data, positions.nbytes)
        for row in range(len(rows)):
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, False
        batch.n_tokens = len(rows)
        api.llama_set_causal_attn(ctx, not is_mutual)
        return int(api.llama_decode(ctx, batch))
    finally:
        api.llama_set_causal_attn(ctx, True)
        api.llama_batch_free(batch)


class TokenBatch:
    """A reusable llama_batch for up to `n_batch` tokens."""

    def __init__(self, n_batch: int) -> None:
        self._api = bindings()
        self._batch = self._api.llama_batch_init(n_batch, 0, 1)
        self._token = self._view("token", n_batch)
        self._pos = self._view("pos", n_batch)
        self._logits = self._view("logits", n_batch)
        self._view("n_seq_id", n_batch)[:] = 1
        self._sequences = np.full(n_batch, -1, np.int32)
        self._offsets = np.arange(n_batch, dtype=np.int32)

    def _view(self, field: str, n_batch: int) -> np.ndarray:
        return np.ctypeslib.as_array(getattr(self._batch, field), (n_batch,))

    def decode(
        self, ctx: object, tokens: Tokens, first_pos: int, outputs: Outputs, sequence: int = 0
    ) -> int:
        """Decode one sequence's tokens at consecutive positions. Returns llama_decode's code."""
        n = len(tokens)
        positions, sequences = first_pos + self._offsets[:n], np.full(n, sequence)
        return self.run(ctx, tokens, positions, sequences, outputs.mask(n))

    def run(
        self,
        ctx: object,
        tokens: Tokens,
        positions: Tokens,
        sequences: Tokens,
        wants_logits: Sequence[bool] | np.ndarray,
    ) -> int:
        """Decode tokens from one or more sequences. Returns llama_decode's result, 0 on success."""
        n = len(tokens)
        self._batch.n_tokens = n
        self._token[:n], self._pos[:n], self._logits[:n] = tokens, positions, wants_logits
        changed = np.flatnonzero(self._sequences[:n] != sequences)
        self._sequences[:n] = sequences
        for row in changed.tolist():
            self._batch.seq_id[row][0] = self._sequences[row]
        return int(self._api.llama_decode(ctx, self._batch))

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
