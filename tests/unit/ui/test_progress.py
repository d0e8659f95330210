"""Test the progress bars' text while a prompt is read."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from pop_base.errors import PopError, StoppedError
from pop_base.progress import Unit, Watch
from pop_local.ui import progress_bars
from pop_local.ui.console import THEME
from pop_local.ui.watch import terminal_watch


@pytest.fixture
def shown(monkeypatch):
    """Return a function that draws a bar; each batch advances the clock by two seconds."""
    now_s = 0.0

    def read(width: int, *steps: tuple[int, int]) -> str:
        file = io.StringIO()
        nonlocal now_s
        now_s = 0.0
        console = Console(file=file, force_terminal=True, width=width, theme=THEME)
        monkeypatch.setattr(progress_bars, "time", SimpleNamespace(monotonic=lambda: now_s))
        monkeypatch.setattr(progress_bars, "err", console)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        with progress_bars.prefill_progress("Reading") as advance:
            for done, total in steps:
                advance(done, total)
                now_s += 2.0
        return file.getvalue()

    return read


def test_bar_shows_speed_and_time_left(shown):
    text = shown(100, (0, 2000))
    assert "0/2000" in text
    assert "tokens/s" not in text
    text = shown(100, (0, 2000), (512, 2000), (1024, 2000))
    assert "1024/2000" in text
    assert "256 tokens/s" in text
    assert "00:04" in text


def test_log_has_a_line_every_20_seconds(monkeypatch, capsys):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(progress_bars, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    with progress_bars.stage_progress("Fitting", Unit.TOKENS) as advance:
        for second in range(1, 101):
            clock.now_s = float(second)
            advance(second, 100)
    assert capsys.readouterr().err.splitlines() == [
        "Fitting: 20%, 1:20 left",
        "Fitting: 40%, 1:00 left",
        "Fitting: 60%, 0:40 left",
        "Fitting: 80%, 0:20 left",
    ]


def test_resumed_work_does_not_raise_the_rate(monkeypatch, capsys):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(progress_bars, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    with progress_bars.stage_progress("Fitting", Unit.TOKENS) as advance:
        advance(90, 100)
        clock.now_s = 25.0
        advance(91, 100)
    assert capsys.readouterr().err.splitlines() == ["Fitting: 91%, 3:45 left"]


def test_new_stage_replaces_bar(monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, theme=THEME)
    monkeypatch.setattr(progress_bars, "err", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal_watch() as watch:
        advance = watch.stage("Writing", Unit.BYTES)
        advance(1, 4)
        watch.stage("Measuring")(512, 512)
        watch.on_stage("Writing", Unit.BYTES)
        advance(4, 4)
    text = file.getvalue()
    assert text.index("Writing") < text.index("Measuring") < text.rindex("Writing")


def test_prints_notes_and_warnings_between_bars(capsys):
    with terminal_watch() as watch:
        watch.on_note("Looking")
        watch.on_warning(PopError("it is old"))
        watch.on_warning(PopError("there is no torch", "install torch", cause="missing-torch"))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(
        "Looking Warning: it is old. Warning: there is no torch; install torch with"
    )
    assert "pop-local[distill]" in said


def test_progress_raises_when_stopped():
    answers = iter([False, True])
    advance = Watch(should_stop=lambda: next(answers)).stage("Reading")
    advance(1, 3)
    with pytest.raises(StoppedError):
        advance(2, 3)
