"""Compare screens with recorded ones: helps and tables in terminals of three widths, and in pipes.

UPDATE_SCREENS=1 records them again. Look at the changes before you commit them.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from pop_local.calibration import needs
from pop_local.cli import COMMANDS
from pop_local.commands.list import list as list_models
from pop_local.commands.pull import pull
from pop_local.measure.speed import ModePair, SpeedRow, Spread
from pop_local.models.model_names import MODELS_VARIABLE
from pop_local.ui import tables
from pop_local.ui.console import THEME
from pop_local.ui.views import analyze as analyze_view
from pop_local.ui.views import convert as convert_view
from pop_local.ui.views.bench import show_speed
from pop_local.ui.views.compare import show_comparison
from pop_local.workflows.bench import Speed
from support import shown_results
from support.program import called
from support.synthetic import make_gguf

SCREENS = Path(__file__).with_name("screens")
WIDTHS = (60, 80, 120)
# Another version of Typer may draw helps differently.
TYPER = ".".join(version("typer").split(".")[:2])


def check(name: str, shown: str) -> None:
    """Compare a screen with the recorded one, or record it."""
    path = SCREENS / f"{name}.txt"
    lines = "".join(f"{line.rstrip()}\n" for line in shown.splitlines())
    if os.environ.get("UPDATE_SCREENS"):
        path.write_text(lines, encoding="utf-8")
    assert lines == path.read_text(encoding="utf-8")


def helps(width: int, commands: Iterable[str] = ("", *COMMANDS)) -> str:
    shown = (called(*name.split(), "--help", COLUMNS=str(width)) for name in commands)
    return f"Typer {TYPER}\n" + "".join(done.stdout for done in shown)


def test_help_matches_recorded_screen():
    shown = helps(80, ["run"])
    recorded = SCREENS / "help-80.txt"
    is_same = recorded.exists() and recorded.read_text("utf-8").startswith(f"Typer {TYPER}\n")
    if not is_same and not os.environ.get("UPDATE_SCREENS"):
        pytest.skip(f"recorded with another version than Typer {TYPER}")
    check("help-80", shown)


def test_help_contains_same_words_at_every_width():
    shown = {width: helps(width) for width in (70, 80, 120)}
    for width, text in shown.items():
        assert max(map(len, text.splitlines())) <= width
        assert words(text) == words(shown[80])


def words(shown: str) -> Counter[str]:
    """Count the letters and digits in boxes and paragraphs, whose words may be split."""
    return Counter(char for char in shown if char.isalnum())


def row(n_prompt: int, seconds: float) -> SpeedRow:
    def spread(value: float) -> Spread:
        return Spread(value, value * 0.98, value * 1.02)

    return SpeedRow(
        *(n_prompt, n_prompt - 50, 30, 0, spread(seconds), spread(seconds / 1.6), spread(1.6)),
        ModePair(20.5, 20.4),
        upstream_ttft_s=spread(3 * seconds),
    )


def bench() -> None:
    model = "models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    backend = "CPU (AMD EPYC Processor), 4 threads"
    rows = (row(512, 1.2), row(2048, 5.61))
    show_speed(
        Speed(model, None, backend, "AVX-512 VNNI", 16, False, 24, 70, "flash attention", rows)
    )


@pytest.fixture
def on_screen(monkeypatch, tmp_path) -> Callable[..., str]:
    """Return a function that returns a view's output in a terminal (`width`) or in a pipe (0)."""
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))

    def shown(
        view: Callable[[], None], width: int, color_system: Literal["truecolor"] | None = None
    ) -> str:
        stream = io.StringIO()
        console = Console(
            file=stream,
            theme=THEME,
            color_system=color_system,
            width=width or None,
            force_terminal=True if width else None,
        )
        for module in (tables, convert_view):
            monkeypatch.setattr(module, "out", console)
        view()
        return stream.getvalue()

    return shown


def compare() -> None:
    show_comparison(shown_results.comparison())


def analyze() -> None:
    analyze_view.show(shown_results.analysis())


def convert() -> None:
    """Show a plan and its result. The plan's time and memory depend on the machine."""
    planned = shown_results.conversion(Path("model.gguf"))
    vars(planned)["seconds"] = 754.0
    convert_view.show_plan(planned)
    convert_view.show_converted(planned, shown_results.converted(planned))


@pytest.fixture(autouse=True)
def a_machine(monkeypatch, tmp_path):
    """Work in a folder with a model, on a machine with fixed speed and memory."""
    folder = tmp_path / "work"
    folder.mkdir()
    make_gguf(folder / "model.gguf", "llama", n_layer=12, n_embd=64)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(needs, "free_bytes", lambda: 8 * 10**9)


VIEWS = [list_models, pull, bench, compare, analyze, convert]


@pytest.mark.parametrize("width", [*WIDTHS, 0])
@pytest.mark.parametrize(
    "view", VIEWS, ids=["list", "pull", "bench", "compare", "analyze", "convert"]
)
def test_tables_match_recorded_screens(on_screen, request, view, width):
    shown = on_screen(view, width)
    assert not width or max(map(len, shown.splitlines())) <= width
    assert "\x1b" not in shown
    check(f"{request.node.callspec.id.split('-')[0]}-{width or 'pipe'}", shown)


def test_colored_table_matches_recorded_screen(on_screen):
    """Check that styles are bold or colors of the terminal's palette, light or dark."""
    shown = on_screen(bench, 80, "truecolor")
    assert "38;2" not in shown and "48;" not in shown
    check("bench-80-color", shown)
