"""A workflow's callbacks to its caller, and the estimated time until the workflow ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.base.progress import Progress


class Unit(Enum):
    TOKENS = "tokens"
    BYTES = "bytes"


# Seconds of work that must pass before the rate is estimated.
_LEAST_S = 5.0


def _ignore(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class PlannedStage:
    """Up to `n_most` planned stages whose names start with `name`.

    `work`: the work of each stage, in a unit that all stages share.
    """

    name: str
    work: float
    n_most: int = 1


class TimeLeft:
    """An estimator of the time left for all planned stages, based on the rate so far.

    Skipped stages do not change the rate.
    """

    def __init__(self, stages: Sequence[PlannedStage]) -> None:
        self._stages, self._began_s = stages, time.monotonic()
        # Number of stages of each kind that have not started.
        self._n_left = [stage.n_most for stage in stages]
        self._at: int | None = None
        self._share = self._done = 0.0

    def begin(self, name: str) -> None:
        """Start a stage. Earlier stages that occur only once then count as finished.

        If the stage is the last one, all earlier stages count as finished.
        """
        self._done, self._share = self._passed, 0.0
        found = [i for i, stage in enumerate(self._stages) if name.startswith(stage.name)]
        self._at = max(found, key=lambda i: len(self._stages[i].name), default=None)
        if self._at is None:
            return
        is_last = self._at == len(self._stages) - 1
        for i, stage in enumerate(self._stages[: self._at]):
            self._n_left[i] *= not (is_last or stage.n_most == 1)
        self._n_left[self._at] = max(0, self._n_left[self._at] - 1)

    def advance(self, done: int, total: int) -> None:
        self._share = done / total if total else 0.0

    @property
    def left_s(self) -> float | None:
        """Return the estimated remaining time in seconds, or None until the rate is known."""
        elapsed_s, passed = time.monotonic() - self._began_s, self._passed
        if elapsed_s < _LEAST_S or not passed:
            return None
        ahead = sum(n * stage.work for n, stage in zip(self._n_left, self._stages, strict=True))
        if self._at is not None:
            ahead += (1 - self._share) * self._stages[self._at].work
        return elapsed_s * ahead / passed

    @property
    def is_at_most(self) -> bool:
        """Return True if `left_s` is an upper bound because optional stages may not run."""
        return any(
            n and stage.n_most > 1 for n, stage in zip(self._n_left, self._stages, strict=True)
        )

    @property
    def _passed(self) -> float:
        work = 0.0 if self._at is None else self._stages[self._at].work
        return self._done + work * self._share


@dataclass(frozen=True)
class Watch:
    """A workflow's callbacks, all of which are optional.

    `on_stages(stages)` receives the planned stages in execution order. `on_stage(name, unit)` is
    called when a stage starts, and `on_progress(done, total)` receives its progress in `unit`.
    `on_note(text)` receives information for the user. `on_warning(error)` receives an error that
    did not stop the work. Workflows call `should_stop` at each progress report and while llama.cpp
    computes. If `should_stop` returns True, the workflow raises StoppedError and leaves no output.
    `may(question)` returns whether the user allows a download.
    """

    on_stage: Callable[[str, Unit], object] = _ignore
    on_progress: Callable[[int, int], object] = _ignore
    on_note: Callable[[str], object] = _ignore
    on_warning: Callable[[PopError], object] = _ignore
    should_stop: Callable[[], bool] = _ignore
    may: Callable[[str], bool] = _ignore
    on_stages: Callable[[Sequence[PlannedStage]], object] = _ignore

    def stage(self, name: str, unit: Unit = Unit.TOKENS) -> Progress:
        """Start a stage and return its progress callback, which may raise StoppedError."""
        self.on_stage(name, unit)
        return self._count

    def _count(self, done: int, total: int) -> None:
        self.on_progress(done, total)
        if self.should_stop():
            raise StoppedError
