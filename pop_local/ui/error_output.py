"""Turn exceptions into an exit code and two lines on stderr: an error and a hint."""

import errno
import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer
from rich.text import Text

from pop_base.errors import PopError, StoppedError
from pop_local.engine.llama import logs
from pop_local.ui.console import err, printable
from pop_local.ui.hints import hint_of, hints_for

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


@contextmanager
def guard(*, debug: bool) -> Iterator[None]:
    """Run a command. On failure, print two lines to stderr and exit with code 1.

    If `debug` is set, the traceback and llama.cpp's log also go to stderr.
    """
    if debug:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    with suppress(OSError):  # stderr may be closed
        logs.on_abort = _last_words()
    try:
        with _terminations_unwind():
            yield
            sys.stdout.flush()
    except (KeyboardInterrupt, StoppedError):
        raise _stopped() from None
    except BrokenPipeError:
        # Otherwise the interpreter reports the closed pipe again at exit.
        with open(os.devnull, "wb") as devnull:  # noqa: PTH123
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE_CLOSED) from None
    except Exception as error:
        if isinstance(error, typer.Abort) and isinstance(error.__context__, KeyboardInterrupt):
            raise _stopped() from None
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
            _explain_removed_option(error)
            # Typer's messages quote the user's arguments.
            if hasattr(error, "message"):
                error.message = printable(str(error.message), kept="\n")
            raise
        if debug:
            sys.stderr.write(printable(traceback.format_exc(), kept="\n"))
        show(as_pop_error(error))
        raise typer.Exit(EXIT_FAILED) from None


def _explain_removed_option(error: Any) -> None:
    """Add the hint for a removed option to Typer's error about an unknown option."""
    name = getattr(error, "option_name", "")
    if hint := hints_for("options").get(name):
        error.message = f"No such option {name}: {hint}"
        error.possibilities = None


def _stopped() -> typer.Exit:
    err.print("Stopped.", style="note")
    return typer.Exit(EXIT_INTERRUPTED)


def as_pop_error(error: Exception) -> PopError:
    """Convert any exception to a PopError with a message and a hint."""
    if isinstance(error, PopError):
        return error
    if isinstance(error, MemoryError):
        return PopError("not enough memory", hints_for("errno")["ENOMEM"])
    unexpected = hints_for("failures")["unexpected"]
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        symbol = errno.errorcode.get(error.errno or 0, "")
        return PopError(f"{where}{error.strerror}", hints_for("errno").get(symbol, unexpected))
    return PopError(f"unexpected {type(error).__name__}: {error}", unexpected)


def show(error: PopError) -> None:
    """Print the error and its hint to stderr. In a terminal, lines wrap between words."""
    _labelled("error", error.message)
    if hint := hint_of(error):
        _labelled("hint", hint)


def _labelled(label: str, text: str) -> None:
    line = printable(" ".join(text.split()))
    err.print(Text.assemble((f"{label}: ", label), line), soft_wrap=not err.is_terminal)


@functools.cache
def _last_words() -> Callable[[str], None]:
    """Return a function that prints llama.cpp's reason for aborting and exits the process."""
    # llama_cpp redirects stderr while it opens a model.
    stderr = os.dup(2)

    def say(reason: str) -> None:
        lines = f"error: llama.cpp aborted: {printable(reason)}\n"
        lines += f"hint: {hints_for('failures')['aborted']}\n"
        os.write(stderr, lines.encode(errors="replace"))
        os._exit(EXIT_FAILED)

    return say


class PrintableFormatter(logging.Formatter):
    """A log formatter that escapes untrusted text, such as file names and a model's metadata.

    Each message stays on one line, so untrusted text cannot imitate another message.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), kept="\n")


@contextmanager
def _terminations_unwind() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    # Under nohup, ignored signals stay ignored.
    ours = [n for n in numbers if n is not None and signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
