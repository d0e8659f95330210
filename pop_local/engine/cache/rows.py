"""The rows of a KV cache: the position of each, and whether it is projected, deep or exact."""

import itertools
from collections.abc import Sequence

import numpy as np

_serial = itertools.count(1)


class CachedRows:
    """The first `n_exact` rows are those of the full model; of later ones only `is_full` is known.

    A row is exact only if every earlier one is, since it attends to them. Rows that were full while
    context rows stood among or before them are deep, and are redone with the others. A state at the
    boundary (`has_state`) is what a row needs to be redone.

    `positions`: of each row, and of the one that comes next: the rows of an image may share one.
    `readings`: a number for each reading, by which sequences know the rows that they share.
    """

    def __init__(self, n_ctx: int) -> None:
        self.is_full = np.zeros(n_ctx, dtype=bool)
        self.has_state = np.zeros(n_ctx, dtype=bool)
        self.positions = np.zeros(n_ctx + 1, dtype=np.int32)
        self.readings = np.zeros(n_ctx, dtype=np.int64)
        self.n_exact = 0

    def read(
        self, start: int, full: np.ndarray, positions: np.ndarray, *, keeps_states: bool
    ) -> None:
        """Rows were decoded from row `start` on; `full` (bool) says which ran all layers.

        `positions`: theirs and that of the next row.
        """
        end = start + len(full)
        self.positions[start : end + 1] = positions
        self.forget_from(start)
        self.is_full[start:end] = full
        self.readings[start:end] = next(_serial)
        self.has_state[start:end] = keeps_states
        if self.n_exact == start and full.all():
            self.n_exact = end

    def deepened(self, positions: Sequence[int]) -> None:
        """A deep pass has run over these rows, at ascending positions."""
        self.is_full[list(positions)] = True
        first, last = positions[0], positions[-1]
        if first <= self.n_exact and last - first + 1 == len(positions):
            self.n_exact = max(self.n_exact, last + 1)

    def forget_from(self, n_rows: int) -> None:
        self.n_exact = min(self.n_exact, n_rows)
        self.has_state[n_rows:] = False
        self.is_full[n_rows:] = False
        self.readings[n_rows:] = 0

    def take_over(self, is_full: np.ndarray, positions: np.ndarray, *, is_exact: bool) -> None:
        """Rows came with a saved state, which holds no states at the boundary."""
        n = len(is_full)
        self.positions[: n + 1] = positions
        self.forget_from(0)
        self.is_full[:n] = is_full
        self.readings[:n] = next(_serial)
        self.n_exact = n if is_exact else 0

    def share(self, other: "CachedRows", n_rows: int) -> None:
        """Have the first rows of another sequence."""
        self.forget_from(0)
        self.positions[: n_rows + 1] = other.positions[: n_rows + 1]
        self.is_full[:n_rows] = other.is_full[:n_rows]
        self.has_state[:n_rows] = other.has_state[:n_rows]
        self.readings[:n_rows] = other.readings[:n_rows]
        self.n_exact = min(other.n_exact, n_rows)

    def follow(self, other: "CachedRows", n_rows: int) -> bool:
        """Take over what was redone of the rows that both share; whether that is any."""
        differ = self.readings[:n_rows] != other.readings[:n_rows]
        n_shared = int(np.append(differ, True).argmax())
        n_exact = min(other.n_exact, n_shared)
        self.is_full[:n_shared] |= other.is_full[:n_shared]
        is_more, self.n_exact = n_exact > self.n_exact, max(n_exact, self.n_exact)
        return is_more

    def can_be_redone(self, n_rows: int) -> bool:
        """Whether the rest of `n_rows` has states; False as well if there is no rest."""
        return bool(self.n_exact < n_rows and self.has_state[self.n_exact : n_rows].all())
