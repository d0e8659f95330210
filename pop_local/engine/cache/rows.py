"""Track the position, depth, and exactness of a KV cache's rows."""

from collections.abc import Sequence

import numpy as np

NO_STALE = 2**31 - 1  # beyond all rows


def n_leading(flags: np.ndarray) -> int:
    """Return the number of leading True values."""
    return int(np.append(~flags, True).argmax())


class CachedRows:
    """Position, depth, and exactness of each row.

    The first `n_exact` rows are identical to the full model's. A row is exact only if all earlier
    rows are exact, because the row attends to them. Full rows after a context row are not exact, so
    a refill recomputes them, too. A refill needs each row's boundary state (`has_state`).

    Rows from `first_stale` onward are stale, because they were computed before an earlier row was
    edited. A refill re-decodes stale rows, so they do not need boundary states.

    `positions`: int32 [n_ctx + 1], including the next row's position. An image's rows may share a
    position. `is_copied`: True for text rows that were copied from another sequence. Boundary
    states are not copied, so a refill also re-decodes copied rows.
    """

    def __init__(self, n_ctx: int) -> None:
        self.is_full = np.zeros(n_ctx, dtype=bool)
        self.has_state = np.zeros(n_ctx, dtype=bool)
        self.positions = np.zeros(n_ctx + 1, dtype=np.int32)
        self.is_copied = np.zeros(n_ctx, dtype=bool)
        self.n_exact = 0
        self.first_stale = NO_STALE

    def n_stale(self, n_rows: int) -> int:
        """Return the number of stale rows among the first `n_rows`."""
        return max(0, n_rows - self.first_stale)

    def read(
        self, start: int, full: np.ndarray, positions: np.ndarray, *, keeps_states: bool
    ) -> None:
        """Record decoded rows starting at `start`. `full`: bool [n], True for full rows.

        `positions`: int32 [n + 1], including the next row's position.
        """
        end = start + len(full)
        self.positions[start : end + 1] = positions
        self.forget_from(start)
        self.is_full[start:end] = full
        self.has_state[start:end] = keeps_states and start < self.first_stale
        if self.n_exact == start and full.all():
            self.n_exact = end

    def edit(self, sources: np.ndarray) -> None:
        """Replace all rows with an edited prompt's rows (see kv_cache.move_rows)."""
        n = len(sources)
        is_full = (sources >= 0) & self.is_full[sources]
        n_same = n_leading(sources == np.arange(n))
        reused = n_same + np.flatnonzero(sources[n_same:] >= 0)
        self.forget_from(n_same)
        self.is_full[:n] = is_full
        self.positions[: n + 1] = np.arange(n + 1)
        if reused.size:
            self.first_stale = min(self.first_stale, int(reused[0]))

    def record_redone(self, start: int, full: np.ndarray, *, keeps_states: bool) -> None:
        """Record that rows starting at `start` were re-decoded in place. `full`: bool [n]."""
        end = start + len(full)
        self.is_full[start:end] = full
        self.has_state[start:end] = keeps_states and end <= self.first_stale
        if start <= self.n_exact and full.all():
            self.n_exact = max(self.n_exact, end)
            self.first_stale = max(self.first_stale, end)

    def record_deep_pass(self, positions: Sequence[int]) -> None:
        """Record a deep pass over the rows at `positions`, which are in ascending order."""
        self.is_full[list(positions)] = True
        first, last = positions[0], positions[-1]
        if first <= self.n_exact and last - first + 1 == len(positions):
            self.n_exact = max(self.n_exact, last + 1)

    def forget_from(self, n_rows: int) -> None:
        """Drop all rows after the first `n_rows`."""
        self.n_exact = min(self.n_exact, n_rows)
        self.has_state[n_rows:] = False
        self.is_full[n_rows:] = False
        self.is_copied[n_rows:] = False
        if self.first_stale >= n_rows:
            self.first_stale = NO_STALE

    def take_over(self, is_full: np.ndarray, positions: np.ndarray, *, is_exact: bool) -> None:
        """Replace all rows with saved rows, which have no boundary states."""
        n = len(is_full)
        self.positions[: n + 1] = positions
        self.forget_from(0)
        self.is_full[:n] = is_full
        self.n_exact = n if is_exact else 0

    def share(self, other: "CachedRows", n_rows: int, copied: np.ndarray | None) -> None:
        """Replace all rows with another sequence's first `n_rows` rows.

        `copied`: bool [n_rows], True for text rows, or None if the cells are shared.
        """
        self.forget_from(0)
        self.positions[: n_rows + 1] = other.positions[: n_rows + 1]
        self.is_full[:n_rows] = other.is_full[:n_rows]
        if copied is None:
            self.has_state[:n_rows] = other.has_state[:n_rows]
        else:
            self.is_copied[:n_rows] = copied
        self.n_exact = min(other.n_exact, n_rows)
        if other.first_stale < n_rows:
            self.first_stale = other.first_stale

    def can_be_redone(self, n_rows: int) -> bool:
        """Return True if a refill is necessary and can make the first `n_rows` rows exact."""
        rows = slice(self.n_exact, min(n_rows, self.first_stale))
        return bool(self.n_exact < n_rows and (self.has_state | self.is_copied)[rows].all())
