"""Print tables, labeled values, and JSON."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pop_local.ui.console import THEME, out, printable

# Width in columns of a table that is written to a pipe.
_UNLIMITED = 10_000
# json.dumps escapes the other control characters.
_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Column:
    """A table column. `cell` returns the column's content for a row (None for an empty cell)."""

    title: str
    cell: Callable[[Any], object]
    numeric: bool = False


def rich_table(columns: Sequence[Column], rows: Sequence[Any]) -> RichTable:
    drawn = RichTable(
        header_style="title", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    cells = [[column.cell(row) for column in columns] for row in rows]
    texts = [["" if cell is None else printable(str(cell)) for cell in row] for row in cells]
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        # Numbers are never wrapped. Long names are folded instead of cut, so users can copy them.
        width = max((len(row[i]) for row in texts), default=0) if column.numeric else None
        drawn.add_column(column.title, justify=justify, overflow="fold", min_width=width)
    for row in texts:
        drawn.add_row(*map(Text, row))
    return drawn


def print_table(columns: Sequence[Column], rows: Sequence[Any]) -> None:
    """Print a table to stdout. In a terminal, the table is no wider than the window."""
    _print(rich_table(columns, rows))


def _print(table: RichTable) -> None:
    if out.is_terminal:
        out.print(table)
        return
    wide = Console(file=out.file, width=_UNLIMITED, color_system=None, theme=THEME)
    with wide.capture() as captured:
        wide.print(table)
    out.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def print_json(value: Any) -> None:
    """Print JSON to stdout, with dataclasses as objects and paths as strings."""
    is_ascii = out.encoding != "utf-8"
    text = json.dumps(value, indent=2, ensure_ascii=is_ascii, allow_nan=False, default=_jsonable)
    out.file.write(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def fields_of(source: object, *names: str) -> dict[str, Any]:
    """Return the named attributes of an object."""
    return {name: getattr(source, name) for name in names}


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot encode {type(value).__name__} as JSON")


Fact = tuple[str, str]


def print_sentence(text: str) -> None:
    """Print text to stdout. In a terminal, wrap lines between words."""
    out.print(Text(printable(text)), soft_wrap=not out.is_terminal)


def print_facts(facts: Sequence[Fact]) -> None:
    """Print labels and values to stdout in two columns. In a terminal, wrap long values."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="note", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts:
        grid.add_row(label, Text(printable(value)))
    _print(grid)
