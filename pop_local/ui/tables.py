"""One description of a table, drawn for a terminal, as Markdown or as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from pop_local.ui.printable import printable
from pop_local.ui.theme import out

# Json escapes the others by itself.
_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _plain(value: object) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Column:
    """`title` is for people; `show` turns a value into text."""

    key: str
    title: str
    show: Callable[[Any], str] = _plain
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """Rows hold the values themselves, in the order of the columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, columns: tuple[Column, ...], items: Iterable[object]) -> Table:
        """Make a row of each item; a column's key names its attribute, or one of an attribute."""
        values = [attrgetter(column.key) for column in columns]
        return cls(columns, tuple(tuple(value(item) for value in values) for item in items))

    def texts(self) -> list[list[str]]:
        return [
            [printable(column.show(value)) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


def rich_table(table: Table) -> RichTable:
    drawn = RichTable(header_style="title")
    for column in table.columns:
        # Folded, not cut: a name is there to be copied.
        drawn.add_column(
            column.title, justify="right" if column.numeric else "left", overflow="fold"
        )
    for row in table.texts():
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def print_table(table: Table) -> None:
    """Print a table on stdout: drawn in a terminal, elsewhere Markdown."""
    if out.is_terminal:
        out.print(rich_table(table))
    else:
        out.file.write(markdown(table) + "\n")


def markdown(table: Table) -> str:
    """Return a Markdown table, its cells padded to read well as text."""
    head = [column.title for column in table.columns]
    body = [[cell.replace("|", "\\|") for cell in row] for row in table.texts()]
    widths = [max(3, *(len(row[i]) for row in [head, *body])) for i in range(len(head))]
    rules = [
        "-" * (width - 1) + ":" if column.numeric else "-" * width
        for column, width in zip(table.columns, widths, strict=True)
    ]
    sides = [">" if column.numeric else "<" for column in table.columns]
    line = "| " + " | ".join(f"{{:{s}{w}}}" for s, w in zip(sides, widths, strict=True)) + " |"
    return "\n".join(line.format(*row) for row in [head, rules, *body])


def print_json(value: Any) -> None:
    """Print JSON on stdout; dataclasses become objects, paths become strings."""
    is_ascii = out.encoding != "utf-8"
    text = json.dumps(value, indent=2, ensure_ascii=is_ascii, allow_nan=False, default=_jsonable)
    out.file.write(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


Fact = tuple[str, str]


def print_facts(facts: Sequence[Fact]) -> None:
    """Print labels and values in two columns on stdout, wrapped only in a terminal."""
    facts = [(label, printable(value)) for label, value in facts]
    if not out.is_terminal:
        width = max(len(label) for label, _ in facts)
        out.file.writelines(f"{label.ljust(width)}  {value}\n" for label, value in facts)
        return
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="note", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts:
        grid.add_row(label, Text(value))
    out.print(grid)
