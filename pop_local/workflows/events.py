"""How work tells what it does: to whoever called, without knowing who that is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.base.progress import Progress


class Unit(Enum):
    TOKENS = "tokens"
    BYTES = "bytes"


# A shorter time tells little of the rate.
_LEAST_S = 5.0


def _ignore(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class Step:
    """Stages whose names begin with `name`: the work of each, in any unit, and how many at most.

    Those of one name may come in `n_parts` that follow each other, and count as one then.
    """

    name: str
    work: float
    n_most: int = 1
    n_parts: int = 1


class Course:
    """How long a whole course of steps still takes, by the rate so far.

    Work that was done before, or is left out, does not count.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps, self._began_s = steps, time.monotonic()
        # In parts.
        self._n_left = [step.n_most * step.n_parts for step in steps]
        self._at: int | None = None
        self._name = ""
        self._first = self._share = self._done = 0.0

    def begin(self, name: str) -> None:
        """Begin a stage; steps before it that come once are over, and all are at the last one."""
        self._done, self._share, self._first = self._passed, 0.0, -1.0
        found = [i for i, step in enumerate(self._steps) if name.startswith(step.name)]
        self._at = max(found, key=lambda i: len(self._steps[i].name), default=None)
        if self._at is None:
            return
        is_last = self._at == len(self._steps) - 1
        for i, step in enumerate(self._steps[: self._at]):
            self._n_left[i] *= not (is_last or step.n_most == 1)
        if name != self._name:
            # The stage before may have done with fewer parts.
            pairs = zip(self._n_left, self._steps, strict=True)
            self._name, self._n_left = name, [n - n % step.n_parts for n, step in pairs]
        self._n_left[self._at] = max(0, self._n_left[self._at] - 1)

    def advance(self, done: int, total: int) -> None:
        self._share = done / total if total else 0.0
        self._first = self._share if self._first < 0 else self._first

    @property
    def left_s(self) -> float | None:
        """None until it is known."""
        elapsed_s, passed = time.monotonic() - self._began_s, self._passed
        if elapsed_s < _LEAST_S or not passed:
            return None
        ahead = sum(n * step.work for n, step in zip(self._n_left, self._steps, strict=True))
        if self._at is not None:
            ahead += (1 - self._share) * self._steps[self._at].work
        return elapsed_s * ahead / passed

    @property
    def is_at_most(self) -> bool:
        """Whether some of the work may not be needed."""
        return any(n and step.n_most > 1 for n, step in zip(self._n_left, self._steps, strict=True))

    @property
    def _passed(self) -> float:
        work = 0.0 if self._at is None else self._steps[self._at].work
        return self._done + work * (self._share - max(0.0, self._first))


@dataclass(frozen=True)
class Watch:
    """Who follows a workflow, and who may end it; all of it may be left out.

    `on_course(steps)` says what stages there will be, in their order; `on_stage(name, unit)` begins
    one, `on_progress(done, total)` counts in its unit.
    `on_note(text)` gets what is worth knowing, `on_warning(error)` what is let through and might
    have been refused. A workflow asks `should_stop` as often as it counts, and while llama.cpp
    reads; it then raises StoppedError and leaves nothing behind. `may(question)` allows a download.
    """

    on_stage: Callable[[str, Unit], object] = _ignore
    on_progress: Callable[[int, int], object] = _ignore
    on_note: Callable[[str], object] = _ignore
    on_warning: Callable[[PopError], object] = _ignore
    should_stop: Callable[[], bool] = _ignore
    may: Callable[[str], bool] = _ignore
    on_course: Callable[[Sequence[Step]], object] = _ignore

    def stage(self, name: str, unit: Unit = Unit.TOKENS) -> Progress:
        """Begin a stage; its work reports to what is returned, which may raise StoppedError."""
        self.on_stage(name, unit)
        return self._count

    def _count(self, done: int, total: int) -> None:
        self.on_progress(done, total)
        if self.should_stop():
            raise StoppedError
