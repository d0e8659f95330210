"""How many prompt rows share a batch with answers."""

# Rows of a prompt beside answers, before it is known how long they take.
_FIRST_ROWS = 64
# For how long rows of a prompt may hold up an answer's token. Few of them take as long as many.
_WAIT_S = 0.25
# Answers keep this share of their speed while a prompt is read.
_SHARE = 0.52
_SMOOTHING = 0.3


class PrefillThrottle:
    """How many rows of a prompt go beside answers, by the time that earlier batches took.

    A batch takes as long as one of its answers alone, and something for having a prompt, and
    something for each of its rows. After one that took long come others of answers alone.
    """

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self._step_s: dict[int, float] = {}
        self._row_s = 0.0
        self._prompt_s = 0.0
        self._owed_s = 0.0

    def rows_beside(self, n_answers: int) -> int:
        """Return so many rows that the answers keep half of their tokens per second."""
        if not n_answers:
            return self._n_batch
        if self._owed_s > 0:
            return 0
        if not (self._step_s and self._row_s):
            return min(_FIRST_ROWS, self._n_batch - n_answers)
        wait_s = max(_WAIT_S, self._step_of(n_answers)) - self._prompt_s
        return min(max(int(wait_s / self._row_s), _FIRST_ROWS), self._n_batch - n_answers)

    def took(self, n_answers: int, n_rows: int, seconds: float) -> None:
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
        # Time that other programs took is not made up for: a prompt would wait for that.
        self._owed_s = min(max(0.0, owed_s), max(_WAIT_S, step_s))

    def _step_of(self, n_answers: int) -> float:
        """The seconds of a batch of so many answers, or of the nearest number that is known."""
        if not self._step_s:
            return 0.0
        return self._step_s[min(self._step_s, key=lambda n: abs(n - n_answers))]


def _smoothed(known: float | None, seconds: float) -> float:
    return known + _SMOOTHING * (seconds - known) if known else seconds
