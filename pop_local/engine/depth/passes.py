"""Deep passes: rows that stopped at the boundary run the rest of the layers."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pop_local.base.errors import StoppedError
from pop_local.engine.depth.rows import CachedRows
from pop_local.engine.llama import backend
from pop_local.engine.llama.interrupt import Interrupt

# How long a chunk of refilling takes. On the CPU the abort callback ends it between two nodes, and
# only its work is lost; a device computes it to its end while a question waits.
CHUNK_S = 1.0
CHUNK_ON_DEVICE_S = 0.2
_FIRST_CHUNK = 64


class DeepPasses:
    """Runs them on the rows of one context, `n_ubatch` rows at the most in each."""

    def __init__(
        self, ctx: Any, rows: CachedRows, interrupt: Interrupt, n_ubatch: int, *, on_device: bool
    ) -> None:
        self.ctx = ctx
        self.rows = rows
        self._interrupt = interrupt
        self._n_ubatch = n_ubatch
        self._chunk_s = CHUNK_ON_DEVICE_S if on_device else CHUNK_S
        self._chunk = min(_FIRST_CHUNK, n_ubatch)

    def run(self, positions: Sequence[int], *, logits: bool = False) -> None:
        """Run the rows at these ascending positions, with the logits of the last one if asked for.

        Raises PopError where the backend refuses; when interrupted, StoppedError or whatever Ctrl-C
        raises.
        """
        for start in range(0, len(positions), self._n_ubatch):
            piece = positions[start : start + self._n_ubatch]
            at_end = start + len(piece) == len(positions)
            with self._interrupt.watching(self.ctx):
                rows = np.asarray(piece, np.int32)
                if backend.deepen(self.ctx, rows, logits=logits and at_end):
                    self.rows.deepened(piece)
                self._interrupt.check()

    def try_out(self, n_rows: int) -> float:
        """Run the next rows that are not exact; returns its seconds, 0 for too few."""
        first = self.rows.n_exact
        if not self.rows.has_state[first : first + n_rows].all():
            return 0.0
        started_s = time.perf_counter()
        self.run(range(first, first + n_rows))
        return time.perf_counter() - started_s

    def refill(
        self, n_rows: int, should_stop: Callable[[], bool] | None, on_chunk: Callable[[], None]
    ) -> None:
        """Make the first `n_rows` exact, in order, until `should_stop` says so.

        Chunks are as large as their time allows, as measured by those before.
        """
        before, self._interrupt.should_stop = self._interrupt.should_stop, should_stop
        try:
            while self.rows.n_exact < n_rows and not (should_stop is not None and should_stop()):
                first = self.rows.n_exact
                piece = range(first, min(first + self._chunk, n_rows))
                started_s = time.perf_counter()
                self.run(piece)
                self._adapt(len(piece), time.perf_counter() - started_s)
                on_chunk()
        except StoppedError:
            return
        finally:
            self._interrupt.should_stop = before

    def _adapt(self, n_rows: int, took_s: float) -> None:
        wanted = int(n_rows * self._chunk_s / max(took_s, 1e-6))
        self._chunk = max(1, min(wanted, 2 * self._chunk, self._n_ubatch))
