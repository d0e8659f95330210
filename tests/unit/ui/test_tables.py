"""Test tables, facts and JSON."""

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pytest

from pop_base.numbers import size
from pop_local.ui import console, tables
from pop_local.ui.tables import Column, print_facts, print_json

SPEEDS = (
    (Column("Name", itemgetter(0)), Column("Speedup", lambda row: f"{row[1]:.2f}x", numeric=True)),
    (("a|b", 1.4142), ("longer name", 12.0)),
)


def test_json_encodes_dataclasses_and_paths(capsys):
    @dataclass(frozen=True)
    class Inner:
        n: int

    @dataclass(frozen=True)
    class Outer:
        inner: tuple[Inner, ...]

    print_json([Outer((Inner(1),)), Path("a") / "b", "ü"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == [{"inner": [{"n": 1}]}, str(Path("a") / "b"), "ü"]
    assert "ü" in printed


def test_json_refuses_nan_and_infinity():
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"ratio": float("nan")})


def test_table_does_not_wrap_in_a_pipe(capsys):
    tables.print_table((Column("Name", itemgetter(0)),), (("x" * 500,),))
    assert capsys.readouterr().out.splitlines()[2] == "x" * 500
    print_facts([("A", "x" * 200), ("Longer", "y")])
    assert capsys.readouterr().out.splitlines() == ["A       " + "x" * 200, "Longer  y"]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_pipe_gets_plain_text_in_any_environment(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "1")
    for stream, stderr in (("out", False), ("err", True)):
        monkeypatch.setattr(console, stream, console._console(stderr=stderr))
    monkeypatch.setattr(tables, "out", console.out)
    tables.print_table(*SPEEDS)
    print_facts([("A", "x" * 200)])
    console.note("a note")
    printed = capsys.readouterr()
    table = ["Name         Speedup", "─" * 21, "a|b            1.41x", "longer name   12.00x"]
    assert printed.out.splitlines() == [*table, "A  " + "x" * 200]
    assert printed.err == "a note\n"


NASTY = "\x1b]0;owned\x07a\nb\u202e\udcff é語"
HARMLESS = r"\x1b]0;owned\x07a\nb\u202e\udcff é語"


def test_terminal_control_characters_are_escaped(monkeypatch, capsys):
    table = ((Column("Name", itemgetter(0)),), ((NASTY,),))
    for is_terminal in (False, True):
        monkeypatch.setattr(console.out, "_force_terminal", is_terminal)
        print_facts([("Name", NASTY)])
        assert HARMLESS in capsys.readouterr().out
    console.out.print(tables.rich_table(*table))
    assert HARMLESS in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (4 * 10**9, "4.00 GB")],
)
def test_sizes_have_decimal_units(n_bytes, text):
    assert size(n_bytes) == text
