"""Test answers in a terminal: the screen during and after streaming."""

import io
from itertools import count
from types import SimpleNamespace

import pyte
import pytest
from rich.console import Console

from pop_local.ui.chat.live_answer import MarkdownAnswer, PlainAnswer, ThinkingSplitter
from pop_local.ui.console import THEME

MARKDOWN = """\
# A title

Some *text* that is long enough to be wrapped in a narrow terminal, with `code` and a
second line, and <b>tags</b>.

1. first
2. second, which has a [link](http://example.org) in it

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return "a\u2028b"  # a comment
```

The end.
"""
CODE = "```python\n" + "".join(f"line_{n} = {n}\n" for n in range(40)) + "```\n\nThe end."
LIST = "".join(f"- item {n} with *emphasis*\n" for n in range(30)) + "\nThe end."


class Emulated:
    """Console whose output is drawn on an emulated terminal."""

    def __init__(self, width: int, height: int) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=1000)
        self.stream = pyte.Stream(self.screen)
        self.out = io.StringIO()
        self.console = Console(
            file=self.out, force_terminal=True, width=width, height=height, theme=THEME
        )

    def lines(self) -> list[str]:
        """Return all lines, including lines that a user finds by scrolling up."""
        self.stream.feed(self.out.getvalue().replace("\n", "\r\n"))
        self.out.seek(0)
        self.out.truncate()
        top = [
            "".join(row[x].data for x in range(self.screen.columns)).rstrip()
            for row in self.screen.history.top
        ]
        return (
            "\n".join([*top, *(line.rstrip() for line in self.screen.display)]).rstrip().split("\n")
        )


def shown(text: str, width: int, height: int, piece: int, monkeypatch) -> list[str]:
    """Return the final screen, after every piece was drawn."""
    monkeypatch.setattr("pop_local.ui.chat.live_answer._INTERVAL_S", 0)
    monkeypatch.setattr("pop_local.ui.chat.live_answer._REST", 0)
    terminal = Emulated(width, height)
    answer = MarkdownAnswer(terminal.console)
    for at in range(0, len(text), piece):
        answer.push(text[at : at + piece])
        assert len(terminal.lines()) >= 1
    answer.end()
    return terminal.lines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (24, 8)])
@pytest.mark.parametrize("text", [MARKDOWN, CODE, LIST], ids=["markdown", "code", "list"])
def test_an_answer_in_pieces_ends_up_as_one_in_one_piece(text, width, height, monkeypatch):
    whole = shown(text, width, 1000, len(text), monkeypatch)
    assert shown(text, width, height, 7, monkeypatch) == whole


def test_nothing_of_the_answer_is_lost(monkeypatch):
    lines = shown(MARKDOWN, 80, 40, 5, monkeypatch)
    assert lines[0] == "A title"
    assert "second line, and <b>tags</b>." in lines
    text = "\n".join(lines)
    for part in ("1 first", "http://example.org", "def f(x):", "# a comment", "The end."):
        assert part in text
    assert "```" not in text and "*text*" not in text


def test_the_growing_block_is_seen_at_once(monkeypatch):
    monkeypatch.setattr("pop_local.ui.chat.live_answer._INTERVAL_S", 0)
    monkeypatch.setattr("pop_local.ui.chat.live_answer._REST", 0)
    terminal = Emulated(40, 10)
    answer = MarkdownAnswer(terminal.console)
    answer.push("The begin")
    assert terminal.lines() == ["The begin"]
    answer.push("ning of\nan **answ")
    assert terminal.lines() == ["The beginning of", "an **answ"]
    answer.push("er**")
    assert terminal.lines() == ["The beginning of", "an answer"]


def test_a_long_list_shows_its_end_while_it_grows(monkeypatch):
    monkeypatch.setattr("pop_local.ui.chat.live_answer._INTERVAL_S", 0)
    monkeypatch.setattr("pop_local.ui.chat.live_answer._REST", 0)
    terminal = Emulated(40, 10)
    answer = MarkdownAnswer(terminal.console)
    for n in range(30):
        answer.push(f"- item {n}\n")
    assert terminal.lines() == [f" • item {n}" for n in range(22, 30)]


def test_drawing_is_rare_when_tokens_come_fast(monkeypatch):
    milliseconds = count()
    clock = SimpleNamespace(monotonic=lambda: next(milliseconds) / 1000)
    monkeypatch.setattr("pop_local.ui.chat.live_answer.time", clock)
    terminal = Emulated(80, 24)
    answer = MarkdownAnswer(terminal.console)
    for _ in range(500):
        answer.push("word ")
    n_written = len(terminal.out.getvalue())
    assert n_written < 10 * 500 * len("word ")


def test_a_terminal_that_becomes_narrower_is_cleaned_up(monkeypatch):
    monkeypatch.setattr("pop_local.ui.chat.live_answer._INTERVAL_S", 0)
    monkeypatch.setattr("pop_local.ui.chat.live_answer._REST", 0)
    terminal = Emulated(40, 20)
    answer = MarkdownAnswer(terminal.console)
    answer.push("x" * 35)
    terminal.console.width = 20
    terminal.out.truncate(0)
    terminal.out.seek(0)
    answer.push("y")
    # The 35 columns fill two rows, so the cursor moves up by two rows.
    assert terminal.out.getvalue().count("\x1b[1A") == 2


def test_thoughts_are_dim_and_their_marks_gone(monkeypatch):
    monkeypatch.setattr("pop_local.ui.chat.live_answer._INTERVAL_S", 0)
    terminal = Emulated(40, 20)
    answer = MarkdownAnswer(terminal.console)
    for piece in ("<th", "ink>Let me", " see.</thi", "nk>\n\nIt is", " **so**."):
        answer.push(piece)
    answer.end()
    assert "\x1b[2mLet me\x1b[0m" in terminal.out.getvalue()
    assert terminal.lines() == ["Let me see.", "", "It is so."]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_only_a_block_at_the_start_is_thinking(size):
    for text, thought, said in (
        ("<think>a < b</think>\n\nc", "a < b", "c"),
        ("no <think>x</think>", "", "no <think>x</think>"),
        ("<think>never ended </th", "never ended </th", ""),
        ("<thin", "", "<thin"),
    ):
        splitter = ThinkingSplitter()
        pieces = [
            p for at in range(0, len(text), size) for p in splitter.push(text[at : at + size])
        ]
        pieces += splitter.push("", is_last=True)
        assert "".join(p.reasoning for p in pieces) == thought
        assert "".join(p.content for p in pieces) == said


def test_a_model_cannot_move_the_cursor(monkeypatch):
    assert shown("a\x1b[2Jb\x07\x9b1m", 40, 10, 100, monkeypatch) == ["a[2Jb1m"]


def test_plain_answers_end_their_line_once():
    for pieces, written in ((["a", "b"], "ab\n"), (["a\n"], "a\n"), (["a\n", ""], "a\n")):
        stream = io.StringIO()
        answer = PlainAnswer(stream)
        for piece in pieces:
            answer.push(piece)
        answer.end()
        assert stream.getvalue() == written


def test_nothing_that_markdown_leaves_out_is_lost(monkeypatch):
    text = "# References\n\n[1]: https://a.org\n\n![plot](https://x.org/p.png)\n"
    lines = "\n".join(shown(text, 80, 20, 7, monkeypatch))
    for part in ("[1]: https://a.org", "plot", "https://x.org/p.png"):
        assert part in lines


@pytest.mark.parametrize("n_columns", [1, 6, 8, 30])
@pytest.mark.parametrize("width", [80, 24])
def test_nothing_of_a_wide_table_is_lost(width, n_columns, monkeypatch):
    address = "https://example.org/" + "0123456789" * 8
    rows = [
        f"| {row} | " + f"{cell} | " * n_columns + "\n"
        for row, cell in (("where", "heading" * 9), ("--:", "---"), (address, f"`{'code' * 20}`"))
    ]
    lines = shown("".join(rows), width, 800, 10_000, monkeypatch)
    seen, written = (sorted(filter(str.isalnum, text)) for text in map("".join, (lines, rows)))
    assert seen == written
