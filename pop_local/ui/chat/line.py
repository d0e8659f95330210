"""Read lines from the user, with editing and completion in a terminal."""

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from pop_base.errors import PopError
from pop_base.output_file import make_private

PROMPT = "> "
CONTINUATION = ". "
WRAPPED = "  "
# The history omits longer lines, which are mostly pasted texts.
_MAX_REMEMBERED = 10_000
PATH_COMMANDS = ("/file", "/image", "/model")

Words = Callable[[], Iterable[str]]
# Returns the next line. Raises EOFError, KeyboardInterrupt, and PopError if the line is not UTF-8.
LineReader = Callable[[], str]


def line_reader(history: Path, commands: Mapping[str, Words]) -> LineReader:
    """Return a function that reads a line from stdin.

    `commands` maps slash commands to functions that complete their arguments.
    """
    if not sys.stdin.isatty():
        return piped_line
    session = _session(
        history=_History(history),
        completer=_Completer(commands),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        multiline=True,
        prompt_continuation=lambda width, line, n_wraps: WRAPPED if n_wraps else CONTINUATION,
        enable_open_in_editor=True,
        key_bindings=_bindings(),
    )
    return lambda: _utf8(session.prompt(PROMPT))


def piped_line() -> str:
    """Read a line from stdin. Raises EOFError at end of input, and PopError for invalid UTF-8."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    # Each piped file may start with a byte order mark.
    line = line.removeprefix(codecs.BOM_UTF8)
    return _utf8(line.rstrip(b"\r\n").decode(errors="surrogateescape"))


def _utf8(line: str) -> str:
    """Return the line unchanged. Raises PopError for NUL characters or invalid UTF-8."""
    if any("\ud800" <= char <= "\udfff" or char == "\0" for char in line):
        raise PopError("skipped a line that is not UTF-8 text", "save the input as UTF-8")
    return line


def _session(**options: Any) -> PromptSession[str]:
    # Prompts must stay visible if stdout is a file.
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    output = PlainTextOutput(stream) if is_dumb_terminal() else create_output(stream)
    # PromptSession(output=...) would disable the mode for dumb terminals.
    with create_app_session(output=output):
        return PromptSession(**options)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _History(FileHistory):
    """A history file that only its owner can read. I/O errors are ignored."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        with suppress(OSError):
            path.chmod(0o600)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if len(string) > _MAX_REMEMBERED:
            return
        with suppress(OSError, UnicodeError):
            make_private(self._path.parent)
            self._path.touch()
            self._path.chmod(0o600)
            super().store_string(string)


class _Completer(Completer):
    def __init__(self, commands: Mapping[str, Words]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        if not name.startswith("/"):
            return
        if not space:
            yield from _matching(self._commands, name, end=" ")
            return
        with suppress(Exception):  # prompt_toolkit would print a traceback
            yield from _matching(self._commands[name](), argument)
            paths = self._paths.get_completions(Document(argument), event)
            for completion in paths if name in PATH_COMMANDS else ():
                # prompt_toolkit shows the slash after a folder, but does not insert it.
                slash = "/" if completion.display_text.endswith("/") else ""
                yield Completion(
                    completion.text + slash, completion.start_position, display=completion.display
                )


def _matching(words: Iterable[str], begun: str, end: str = "") -> Iterator[Completion]:
    for word in words:
        if word.startswith(begun):
            yield Completion(word + end, start_position=-len(begun), display=word)
