"""Depth while the answer is written: with each token, the rows that the last few attend to."""

from pop_local.engine.depth.passes import DeepPasses
from pop_local.engine.depth.select import best_rows, spread
from pop_local.engine.llama import backend

# Answer rows whose attention chooses; docs/depth.md.
N_ASKING = 8


class OnlineRefill:
    """Runs `n_rows` more rows before each token of an answer; 0: none, at no cost."""

    def __init__(self, passes: DeepPasses, n_rows: int) -> None:
        self._passes = passes
        self._n_rows = n_rows
        self._begun = -1

    def before(self, position: int) -> None:
        """To be called before the token at this position is decoded."""
        if not self._n_rows:
            return
        if 0 <= self._begun < position:
            self._run_best(position)
        if self._begun < 0 or position - self._begun >= N_ASKING:
            backend.set_question(self._passes.ctx, position)
            self._begun = position

    def end(self) -> None:
        if self._begun >= 0:
            backend.set_question(self._passes.ctx, -1)

    def _run_best(self, n_cached: int) -> None:
        rows = self._passes.rows
        may_be = rows.has_state[:n_cached] & ~rows.is_full[:n_cached]
        if may_be.any():
            scores = spread(backend.get_scores(self._passes.ctx, n_cached))
            self._passes.run(best_rows(scores, may_be, self._n_rows).tolist())
