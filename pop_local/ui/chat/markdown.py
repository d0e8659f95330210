"""Markdown rendered as terminal lines, without losing any text."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console
from rich.markdown import Heading, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.text import Text

Lines = list[list[Segment]]

# Show HTML and link definitions unchanged and images as links: rich would drop them.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_PARSER.disable(["reference", "image"])
# Parsing only blocks takes half the time.
_BLOCKS = MarkdownIt("commonmark", {"html": False}).enable("table")
_BLOCKS.disable(["inline", "reference"])
# Minimum width of a table's column, with its padding.
_LEAST_COLUMN = 4


class _LeftHeading(Heading):
    """A left-aligned heading; rich centres it or draws a box."""

    def __rich_console__(self, console: Console, options: Any) -> Any:
        self.text.justify = "left"
        yield self.text


class _WholeTable(TableElement):
    """A table that wraps cells; rich cuts off wide cells and drops columns."""

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

    def __init__(self, text: str, code_theme: str) -> None:
        super().__init__("", code_theme=code_theme, hyperlinks=False)
        self.parsed = [_with_breaks(token) for token in _PARSER.parse(text)]


def _with_breaks(token: Token) -> Token:
    for child in token.children or []:
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token


def top_level(text: str) -> list[str]:
    """Split a text into its blocks: paragraphs, lists, tables, code and so on."""
    lines = re.split(r"(?<=\n)", text)
    starts = [token.map[0] for token in _BLOCKS.parse(text) if token.level == 0 and token.map]
    if not starts:
        return [text] if text.strip() else []
    starts[0] = 0
    ends = [*starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)]


def is_code(text: str) -> bool:
    """Return True for a single fenced code block."""
    return [token.type for token in _BLOCKS.parse(text)] == ["fence"]


def rendered(console: Console, text: str, code_theme: str, width: int) -> Lines:
    """Return lines without padding, and without blank lines at both ends."""
    markdown, options = _Markdown(text, code_theme), console.options.update(width=width)
    lines = [_trimmed(line) for line in console.render_lines(markdown, options, pad=False)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        del lines[0]
    return lines


def _trimmed(line: list[Segment]) -> list[Segment]:
    """Remove trailing spaces, which would be copied and wrapped."""
    while line and not (line[-1].style and line[-1].style.bgcolor):
        text = line[-1].text.rstrip()
        if text:
            return [*line[:-1], Segment(text, line[-1].style)]
        line = line[:-1]
    return line
