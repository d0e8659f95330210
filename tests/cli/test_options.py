"""Test option groups: objects for commands, headings in the help."""

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
import typer
from typer.testing import CliRunner

from pop_local.cli import COMMANDS
from pop_local.commands.option_expansion import EXPERT, Group, expand_options, option
from pop_local.ui.lazy import imported
from support.program import called as run_here

MOST_IN_SIGHT = 15


@dataclass(frozen=True)
class Sizes(Group):
    """Two numbers and a switch."""

    panel: ClassVar[str] = "How large"

    width: int = option("From left to right.", "CELLS", default=3, min=1)
    n_rows: int | None = option("From top to bottom.", flag="--rows -r")
    is_bold: bool = option("Thicker.", default=False, flag="--bold")


@expand_options
def draw(what: str, *, sizes: Sizes = Sizes(n_rows=7)) -> None:
    """Print the arguments."""
    print(json.dumps([what, asdict(sizes)]))


def called(*arguments: str):
    program = typer.Typer()
    program.command()(draw)
    return CliRunner().invoke(program, [*arguments])


def test_option_group_becomes_one_object():
    plain = called("box")
    assert json.loads(plain.stdout) == ["box", {"width": 3, "n_rows": 7, "is_bold": False}]
    given = called("box", "--width", "4", "-r", "2", "--bold")
    assert json.loads(given.stdout) == ["box", {"width": 4, "n_rows": 2, "is_bold": True}]


@pytest.mark.parametrize("wrong", [("--width", "0"), ("--n-rows", "2"), ("--no-bold",)])
def test_option_group_checks_limits_and_names(wrong):
    assert called("box", *wrong).exit_code == 2


def test_help_groups_options_by_heading():
    shown = called("--help").stdout
    assert shown.index("Options") < shown.index("How large") < shown.index("From left to right.")


@pytest.mark.parametrize("name", COMMANDS)
def test_shows_few_options_before_advanced_ones(name):
    """Count --help, too."""
    function = imported("pop_local.commands", name)
    if isinstance(function, typer.Typer):
        return
    program = typer.Typer(add_completion=False)
    program.command()(function)
    options = [
        getattr(param, "rich_help_panel", None) == EXPERT
        for param in typer.main.get_command(program).params
        if param.param_type_name == "option"
    ]
    assert options == sorted(options)
    assert options.count(False) < MOST_IN_SIGHT


def test_help_shows_each_default_once():
    shown = run_here("chat", "--help", COLUMNS="200").stdout
    assert "(default: edited)" in shown and "[default: edited]" not in shown
    assert "[default: -1]" in shown


def test_top_k_of_one_ignores_temperature(tiny):
    def answer(*options: object) -> str:
        done = run_here("run", tiny, "hello", *options, "--max-tokens", 6, "--threads", 1)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert answer("--top-k", 1, "--temperature", 9) == answer("--temperature", 0)
