"""The chat loop: answer questions and run slash commands."""

import sys
from collections.abc import Callable

from pop_base.errors import PopError
from pop_local.config.settings import state_dir
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.line import LineReader, line_reader
from pop_local.ui.chat.refill import idling
from pop_local.ui.chat.sessions import Autosave, note_unsaved
from pop_local.ui.chat.slash import ALIASES, COMMANDS, run_command
from pop_local.ui.error_output import as_pop_error

LEAVE_HINT = "To quit, type /bye or press Ctrl-D."


def talk(chat: Dialogue) -> None:
    """Chat until the user quits or the piped input ends."""
    words = {name: command.words for name, command in COMMANDS.items()}
    autosave = Autosave()
    if sys.stdin.isatty():
        note_unsaved(chat)
    try:
        converse(chat, line_reader(state_dir() / "history", words), autosave.keep)
    except KeyboardInterrupt:  # the usual end of a chat with piped input
        autosave.remove()
        raise
    autosave.remove()


def converse(
    chat: Dialogue, read_line: LineReader, keep: Callable[[Dialogue], None] = lambda chat: None
) -> None:
    """Read and process lines until the input ends, calling `keep(chat)` before each line.

    Raises KeyboardInterrupt after Ctrl-C if the input is piped.
    """
    while True:
        try:
            keep(chat)
            _read_and_run(chat, read_line)
        except KeyboardInterrupt:
            if not chat.screen.is_typed:
                raise
            chat.screen.note(LEAVE_HINT)
        except EOFError:
            return
        except BrokenPipeError:
            raise
        except Exception as error:  # an error must not end the conversation
            chat.fail(as_pop_error(error))


def _read_and_run(chat: Dialogue, read_line: LineReader) -> None:
    try:
        with idling(chat):
            line = read_line()
    except BrokenPipeError:
        raise
    except OSError as error:  # nohup closes stdin
        hint = "run pop-local chat in a terminal, or pipe lines into it"
        chat.fail(PopError(f"cannot read the input: {error.strerror or error}", hint))
        raise EOFError from error
    if not line.strip():
        return
    if line.startswith("/") or line.rstrip().lower() in ALIASES:
        run_command(chat, line)
    else:
        chat.ask(line.strip())
