"""Limit the number of prompt rows in batches that also contain answer rows."""

# Limit on prompt rows until enough batches have been timed, and the smallest limit afterwards.
_FIRST_ROWS = 64
# Maximum time that prompt rows delay an answer's next token. With a shorter time, prompts would be
# read more slowly.
_WAIT_S = 0.25
# 0.52: answers keep half their tokens per second during a prefill (docs/server.md).
_SHARE = 0.52
_SMOOTHING = 0.3


class PrefillThrottle:
    """A limit on the number of prompt rows in batches that also contain answer rows.

    A batch's predicted time is its time without prompt rows, plus a constant, plus a cost for each
    prompt row. All three are estimated from earlier batches. After a slow batch, some batches
    contain only answer rows.
    """

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self._step_s: dict[int, float] = {}
        self._row_s = 0.0
        self._prompt_s = 0.0
        self._owed_s = 0.0

    def max_prompt_rows(self, n_answers: int) -> int:
        """Return the maximum number of prompt rows that slow decoding by no more than half."""
        if not n_answers:
            return self._n_batch
        if self._owed_s > 0:
            return 0
        if not (self._step_s and self._row_s):
            return min(_FIRST_ROWS, self._n_batch - n_answers)
        wait_s = max(_WAIT_S, self._step_of(n_answers)) - self._prompt_s
        return min(max(int(wait_s / self._row_s), _FIRST_ROWS), self._n_batch - n_answers)

    def record(self, n_answers: int, n_rows: int, seconds: float) -> None:
        """Record how long a batch with `n_rows` prompt rows took."""
        if not n_answers:
            self._owed_s = 0.0
            if n_rows >= _FIRST_ROWS:
                self._row_s = _smoothed(self._row_s, seconds / n_rows)
            return
        if n_rows:
            rest_s = seconds - self._step_of(n_answers) - n_rows * self._row_s
            self._prompt_s = max(0.0, _smoothed(self._prompt_s, rest_s))
        else:
            self._step_s[n_answers] = _smoothed(self._step_s.get(n_answers), seconds)
        step_s = self._step_of(n_answers)
        owed_s = self._owed_s + _SHARE * seconds - step_s
        # Capped, so that a delay caused by other programs does not stall the prompt for long.
        self._owed_s = min(max(0.0, owed_s), max(_WAIT_S, step_s))

    def _step_of(self, n_answers: int) -> float:
        """Return the measured time for the batch size closest to `n_answers`."""
        if not self._step_s:
            return 0.0
        return self._step_s[min(self._step_s, key=lambda n: abs(n - n_answers))]


def _smoothed(average: float | None, seconds: float) -> float:
    return average + _SMOOTHING * (seconds - average) if average else seconds
