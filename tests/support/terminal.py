"""Run a program on a pseudo-terminal and emulate its screen."""

import os
import re
import sys
import time
from collections.abc import Mapping
from itertools import chain

import pexpect
import pyte

TIMEOUT_S = 60


class _Screen(pyte.HistoryScreen):
    """Keeps the terminal's replies to queries of the cursor position."""

    replies = ""

    def write_process_input(self, data: str) -> None:
        self.replies += data


class Terminal:
    """Runs `python ARGUMENTS`; `text` is the screen, preceded by the lines scrolled off it."""

    def __init__(
        self,
        *arguments: str,
        width: int = 200,
        height: int = 40,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self._screen = _Screen(width, height, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self._screen)
        self._child = pexpect.spawn(
            sys.executable,
            list(arguments),
            encoding="utf-8",
            timeout=TIMEOUT_S,
            dimensions=(height, width),
            env=clean | {"TERM": "xterm-256color"} | dict(environment or {}),
        )
        self._child.delaybeforesend = None
        self._at = 0
        self.raw = ""
        self.has_ended = False
        self.match: re.Match[str] | None = None

    @property
    def text(self) -> str:
        rows = chain(
            self._screen.history.top, (self._screen.buffer[y] for y in range(self._screen.lines))
        )
        width = self._screen.columns
        lines = ["".join(row[x].data for x in range(width)).rstrip() for row in rows]
        return "\n".join(lines).rstrip("\n")

    def expect(self, pattern: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a pattern appears after the previously expected one."""
        deadline = time.monotonic() + timeout_s
        while (match := re.compile(pattern).search(self.text, self._at)) is None:
            assert not self.has_ended, f"ended without {pattern!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            self._read()
        self._at = match.end()
        self.match = match

    def expect_prompt(self, timeout_s: float = TIMEOUT_S) -> None:
        self.expect(r"(?m)^>$", timeout_s)

    def expect_end(self) -> int:
        """Wait for the program to end and return its exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.has_ended:
            assert time.monotonic() < deadline, f"has not ended:\n{self.text}"
            self._read()
        self._child.close()
        return int(self._child.exitstatus)

    def send(self, keys: str) -> None:
        self._child.send(keys)

    def line(self, text: str) -> None:
        self.send(text + "\r")

    def interrupt(self) -> None:
        self.send("\x03")

    def interrupt_question(self) -> None:
        """Press Ctrl-C, twice if needed: input() may miss one while it starts."""
        for _ in range(6):
            self.interrupt()
            deadline = time.monotonic() + TIMEOUT_S / 6
            while not self.has_ended and time.monotonic() < deadline:
                self._read()
            if self.has_ended:
                return

    def end_of_input(self) -> None:
        self.send("\x04")

    def resize(self, width: int, height: int) -> None:
        self._screen.resize(height, width)
        self._child.setwinsize(height, width)

    def group(self, number: int) -> int:
        """Return a number with commas from the last match, or 0 without a match."""
        assert self.match is not None
        return int((self.match[number] or "0").replace(",", ""))

    def _read(self) -> None:
        try:
            received = self._child.read_nonblocking(65536, timeout=0.2)
        except pexpect.TIMEOUT:
            return
        except pexpect.EOF:
            self.has_ended = True
            return
        self.raw += received
        self._stream.feed(received)
        self.send(self._screen.replies)
        self._screen.replies = ""
