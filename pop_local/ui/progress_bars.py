"""Show progress on stderr, as bars in a terminal and as occasional lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pop_converter.base.numbers import duration
from pop_converter.base.progress import Unit
from pop_local.ui.console import err, note, printable

Advance = Callable[[int, int], None]
_NARROW_COLUMNS = 70
_LONG_TOKENS = 256
# Drawing takes CPU time from the model.
_DRAWN_PER_S = 4
_LINE_EVERY_S = 20.0
_RATE, _LEFT = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[left]}")


@dataclass
class Pace:
    """State shared by consecutive bars: when a line was last printed, and the total time left."""

    said_s: float = field(default_factory=lambda: time.monotonic())
    left_s: float | None = None

    @property
    def left(self) -> str:
        """The time left for all stages, or "" if it is unknown."""
        return "" if self.left_s is None else f"about {duration(self.left_s)} until all stages end"


def stage_progress(what: str, unit: Unit, pace: Pace) -> AbstractContextManager[Advance]:
    """Show a stage's progress, measured in `unit`, while the block runs."""
    if unit is Unit.BYTES:
        return _bar(what, (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()), pace)
    return _bar(what, (MofNCompleteColumn(), _LEFT), pace)


@contextmanager
def prefill_progress(what: str) -> Iterator[Advance]:
    """Show a prefill's progress in tokens and tokens/s, unless the prompt is short."""
    with ExitStack() as stack:
        bars: list[Advance] = []

        def advance(done: int, total: int) -> None:
            if not bars and total >= _LONG_TOKENS:
                wide = (MofNCompleteColumn(), _RATE, _LEFT)
                bars.append(stack.enter_context(_bar(what, wide, Pace())))
            for bar in bars:
                bar(done, total)

        yield advance


def _clock(left_s: float) -> str:
    minutes, seconds = divmod(math.ceil(max(0.0, left_s)), 60)
    return f"{minutes}:{seconds:02}"


def _in_words(what: str, pace: Pace) -> Advance:
    begun: tuple[int, float] | None = None

    def advance(done: int, total: int) -> None:
        nonlocal begun
        now_s = time.monotonic()
        # The rate excludes work that was already done before the first call.
        first_done, first_s = begun = begun or (done, now_s)
        if now_s - pace.said_s < _LINE_EVERY_S or not first_done < done < total:
            return
        pace.said_s = now_s
        left_s = (now_s - first_s) * (total - done) / (done - first_done)
        note(f"{what}: {done / total:.0%}, {pace.left or f'{_clock(left_s)} left'}")

    return advance


@contextmanager
def _bar(what: str, wide: tuple[ProgressColumn, ...], pace: Pace) -> Iterator[Advance]:
    if not (err.is_interactive and sys.stderr.isatty()):
        yield _in_words(what, pace)
        return
    # The last column is the time left.
    columns = (TaskProgressColumn(), wide[-1]) if err.width < _NARROW_COLUMNS else wide
    label = TextColumn("{task.description}", markup=False)
    shown = Progress(
        *(label, BarColumn(bar_width=None), *columns),
        console=err,
        transient=True,
        expand=True,
        refresh_per_second=_DRAWN_PER_S,
    )
    with shown:
        task = shown.add_task(printable(what), total=None, rate="", left="-:--")
        begun_s = time.monotonic()

        def advance(done: int, total: int) -> None:
            taken_s = max(time.monotonic() - begun_s, 1e-6)
            # rich's own rate is unknown before the second batch.
            rate = f"{done / taken_s:,.0f} tokens/s" if done else ""
            left = pace.left or (_clock(taken_s * (total - done) / done) if done else "-:--")
            shown.update(task, completed=done, total=total or None, rate=rate, left=left)

        yield advance
