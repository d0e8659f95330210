"""Show progress on stderr, as bars in a terminal and as occasional lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

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

from pop_base.progress import Unit
from pop_local.ui.console import err, note, printable

Advance = Callable[[int, int], None]
_NARROW_COLUMNS = 70
_LONG_TOKENS = 256
# Drawing takes CPU time from the model.
_DRAWN_PER_S = 4
_LINE_EVERY_S = 20.0
# The time left is computed from the rate over this period, which exceeds the longest batch.
_RATE_PERIOD_S = 3600.0


def stage_progress(what: str, unit: Unit) -> AbstractContextManager[Advance]:
    """Show a stage's progress, measured in `unit`, while the block runs."""
    if unit is Unit.BYTES:
        return _bar(what, DownloadColumn(), TransferSpeedColumn())
    return _bar(what, MofNCompleteColumn())


@contextmanager
def prefill_progress(what: str) -> Iterator[Advance]:
    """Show a prefill's progress in tokens and tokens/s, unless the prompt is short."""
    with ExitStack() as stack:
        bars: list[Advance] = []

        def advance(done: int, total: int) -> None:
            if not bars and total >= _LONG_TOKENS:
                rate = TextColumn("{task.fields[rate]}")
                bars.append(stack.enter_context(_bar(what, MofNCompleteColumn(), rate)))
            for bar in bars:
                bar(done, total)

        yield advance


def _in_words(what: str) -> Advance:
    begun: tuple[int, float] | None = None
    printed_s = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal begun, printed_s
        now_s = time.monotonic()
        # The rate excludes work that was already done before the first call.
        first_done, first_s = begun = begun or (done, now_s)
        if now_s - printed_s < _LINE_EVERY_S or not first_done < done < total:
            return
        printed_s = now_s
        left_s = (now_s - first_s) * (total - done) / (done - first_done)
        minutes, seconds = divmod(math.ceil(left_s), 60)
        note(f"{what}: {done / total:.0%}, {minutes}:{seconds:02} left")

    return advance


@contextmanager
def _bar(what: str, *wide: ProgressColumn) -> Iterator[Advance]:
    if not (err.is_interactive and sys.stderr.isatty()):
        yield _in_words(what)
        return
    columns = (TaskProgressColumn(),) if err.width < _NARROW_COLUMNS else wide
    label = TextColumn("{task.description}", markup=False)
    progress = Progress(
        *(label, BarColumn(bar_width=None), *columns, TimeRemainingColumn(compact=True)),
        console=err,
        transient=True,
        expand=True,
        refresh_per_second=_DRAWN_PER_S,
        speed_estimate_period=_RATE_PERIOD_S,
    )
    with progress:
        task = progress.add_task(printable(what), total=None, rate="")

        def advance(done: int, total: int) -> None:
            taken_s = max(progress.tasks[0].elapsed or 0.0, 1e-6)
            rate = f"{done / taken_s:,.0f} tokens/s" if done else ""
            progress.update(task, completed=done, total=total or None, rate=rate)

        yield advance
