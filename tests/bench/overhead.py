"""Shared by measure_chat.py and measure_server.py: options, ratios within rounds, the report."""

import argparse
import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from statistics import median

from measure_speed import CLOCKS, machine
from pop_local.measure.speed import Spread, spread

SETTING = ("model", "prompt", "words", "decode", "rounds", "cpu", "clock")
COLUMNS, ROWS = 100, 40


@dataclass(frozen=True)
class Answered:
    """The figures that must not differ between two ways to the same answer."""

    text: str
    n_prompt: int
    n_cached: int
    n_pruned: int
    n_decoded: int


@dataclass(frozen=True)
class Overhead:
    """Tokens per second of both ways (medians); `overhead`: the share of time added, by round."""

    what: str
    answered: Answered
    base: float
    measured: float
    overhead: Spread

    @property
    def line(self) -> str:
        done, by_round = self.answered, self.overhead
        return (
            f"| {self.what} | {done.n_prompt} | {done.n_pruned} | {done.n_decoded}"
            f" | {self.base:.1f} | {self.measured:.1f}"
            f" | {by_round.median:+.2%} ({by_round.min:+.2%} to {by_round.max:+.2%}) |"
        )


def overhead(
    what: str, answered: Answered, n_tokens: int, base_s: Sequence[float], ours_s: Sequence[float]
) -> Overhead:
    """Compare two ways to the same tokens, each with its seconds round by round."""
    return Overhead(
        what,
        answered,
        base=n_tokens / median(base_s),
        measured=n_tokens / median(ours_s),
        overhead=spread(ours / base - 1 for base, ours in zip(base_s, ours_s, strict=True)),
    )


def parser(doc: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    options.add_argument("model")
    options.add_argument("--decode", type=int, default=256, help="tokens of an answer, at most")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--cpu", type=int, help="pin the model's process to this CPU")
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    options.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return options


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Children that are started meanwhile stay on that CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cpu is None else {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def on_a_terminal(command: Sequence[str], cpu: int | None, **environment: str) -> None:
    """Runs a program on a pseudo-terminal whose screen nobody looks at. Raises SystemExit."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    # It does not say where its cursor is.
    fixed = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with pinned(cpu):
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=kept | fixed | environment
        )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # how Linux says that the program has ended
        while received := os.read(master, 65536):
            shown = (shown + received)[-4000:]
    if process.wait() != 0:
        raise SystemExit(shown.decode(errors="replace"))


def report(options: argparse.Namespace, rows: Sequence[Overhead]) -> str:
    if options.json:
        setting = {name: value for name, value in vars(options).items() if name in SETTING}
        setting |= {"machine": machine(), "threads": 1}
        return json.dumps(setting | {"rows": [asdict(row) for row in rows]}, indent=2)
    lines = [
        f"{options.model}: {machine()}, 1 thread, {options.rounds} rounds, {options.clock} time",
        "",
        "| | prompt | pruned | decoded | base tokens/s | measured tokens/s | overhead |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(row.line for row in rows)])
