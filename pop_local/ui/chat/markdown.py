"""Render Markdown as terminal lines without dropping any text."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Heading, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.text import Text

Lines = list[list[Segment]]

# Show HTML and link definitions unchanged, and images as links. rich would drop all three.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_PARSER.disable(["reference", "image"])
# Parsing blocks without inline markup takes half the time.
_BLOCKS = MarkdownIt("commonmark", {"html": False}).enable("table")
_BLOCKS.disable(["inline", "reference"])
# Minimum width of a table's column, including the padding.
_LEAST_COLUMN = 4


class _LeftHeading(Heading):
    """A left-aligned heading (rich would center the heading or draw it in a box)."""

    def __rich_console__(self, console: Console, options: Any) -> Any:
        self.text.justify = "left"
        yield self.text


class _WholeTable(TableElement):
    """A table that wraps wide cells (rich would cut them off)."""

    def __rich_console__(self, console: Console, options: Any) -> Any:
        tables: Any = super().__rich_console__(console, options)
        for table in tables:
            for column in table.columns:
                column.overflow = "fold"
            if len(table.columns) * _LEAST_COLUMN <= options.max_width:
                yield table
            else:
                yield from self._rows()

    def _rows(self) -> Iterator[Text]:
        head = self.header.row if self.header else None
        for row in [*([head] if head else []), *(self.body.rows if self.body else [])]:
            yield Text(" | ").join(cell.content for cell in row.cells)


class _Markdown(Markdown):
    """Markdown that keeps line breaks and shows link targets."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "table_open": _WholeTable,
    }

    def __init__(self, text: str) -> None:
        # The style ansi_dark uses the terminal's own colors.
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for child in chain.from_iterable(token.children or () for token in self.parsed):
            if child.type == "softbreak":
                child.type = "hardbreak"


def top_level(text: str) -> list[str]:
    """Split text into top-level blocks, such as paragraphs, lists, tables and code."""
    lines = re.split(r"(?<=\n)", text)
    starts = [token.map[0] for token in _BLOCKS.parse(text) if token.level == 0 and token.map]
    if not starts:
        return [text] if text.strip() else []
    starts[0] = 0
    ends = [*starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)]


def rendered(console: Console, text: str) -> Lines:
    """Render Markdown as unpadded terminal lines, without leading or trailing blank lines."""
    lines = [_trimmed(line) for line in console.render_lines(_Markdown(text), pad=False)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        del lines[0]
    return lines


def _trimmed(line: list[Segment]) -> list[Segment]:
    """Remove a line's trailing spaces, which a terminal would copy and wrap."""
    while line and not (line[-1].style and line[-1].style.bgcolor):
        text = line[-1].text.rstrip()
        if text:
            return [*line[:-1], Segment(text, line[-1].style)]
        line = line[:-1]
    return line
