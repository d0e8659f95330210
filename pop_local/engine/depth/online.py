"""Depth while the answer is written: with each token, the rows that the last few attend to."""

import statistics
import time

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.depth.passes import run_deep
from pop_local.engine.depth.select import best_rows, spread
from pop_local.engine.llama import backend

# Answer rows whose attention chooses; docs/depth.md.
N_ASKING = 8
# The share by which refilling may slow a token down.
MAX_SLOWDOWN = 0.1
_N_TIMED = 4
_N_TRIAL = 8


class OnlineRefill:
    """Runs `n_rows` more rows before each token of an answer; 0: none, at no cost.

    None: as many as MAX_SLOWDOWN allows, by the time of the first tokens and of one trial. Where
    decoding is bound by memory that is some; where it computes at the machine's limit, none.
    """

    def __init__(self, cache: KvCache, n_rows: int | None) -> None:
        self._cache = cache
        self.n_rows = n_rows
        self._steps_s: list[float] = []
        self._before_s = 0.0
        self._begun = -1

    def before_row(self, row: int) -> None:
        """To be called before the token of an answer at this row is decoded.

        Raises PopError and StoppedError as `run_deep` does.
        """
        if self.n_rows is None:
            self._time()
        if not self.n_rows:
            return
        if 0 <= self._begun < row:
            self._run_best(row, self.n_rows)
        if self._begun < 0 or row - self._begun >= N_ASKING:
            backend.set_question(self._cache.context.ctx, row)
            self._begun = row

    def end(self) -> None:
        """The answer is written."""
        if self._begun >= 0 and not self._cache.context.is_closed:
            backend.set_question(self._cache.context.ctx, -1)
        self._begun = -1
        self._before_s = 0.0

    def _time(self) -> None:
        now_s, before_s = time.perf_counter(), self._before_s
        self._before_s = now_s
        if before_s:
            self._steps_s.append(now_s - before_s)
        if len(self._steps_s) == _N_TIMED:
            step_s = statistics.median(self._steps_s)
            trial_s = self._try_out()
            if trial_s:
                self.n_rows = int(_N_TRIAL * MAX_SLOWDOWN * step_s / trial_s)
            self._steps_s.clear()

    def _try_out(self) -> float:
        """Run the next rows that are not exact; returns its seconds, 0 for too few."""
        rows = self._cache.rows
        first = rows.n_exact
        if not rows.has_state[first : first + _N_TRIAL].all():
            return 0.0
        started_s = time.perf_counter()
        run_deep(self._cache, range(first, first + _N_TRIAL))
        return time.perf_counter() - started_s

    def _run_best(self, n_cached: int, n_rows: int) -> None:
        rows = self._cache.rows
        may_be = rows.has_state[:n_cached] & ~rows.is_full[:n_cached]
        if may_be.any():
            scores = spread(backend.get_scores(self._cache.context.ctx, n_cached))
            run_deep(self._cache, best_rows(scores, may_be, n_rows).tolist())
