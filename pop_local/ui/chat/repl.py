"""The chat loop: reads lines and passes them on, as questions or as commands."""

from functools import partial

from pop_local.config.settings import history_file
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.line import LineReader, line_reader
from pop_local.ui.chat.slash import COMMANDS, EditRequest, LeaveRequest, obey
from pop_local.ui.errors import as_pop_error
from pop_local.ui.keys import unechoed_keys

LEAVE_HINT = "To leave, type /exit or press Ctrl-D."


def talk(chat: Dialogue) -> None:
    """Talk in the terminal until the user leaves, or the piped lines end."""
    words = {name: command.words for name, command in COMMANDS.items()}
    with unechoed_keys():
        Repl(chat, line_reader(history_file(), words)).run()


class Repl:
    """`run` returns when the user leaves or the input ends."""

    def __init__(self, chat: Dialogue, read_line: LineReader) -> None:
        self._chat = chat
        self._read_line = read_line

    def run(self) -> None:
        while True:
            try:
                self._next()
            except KeyboardInterrupt:
                self._chat.screen.note(LEAVE_HINT)
            except (EOFError, LeaveRequest):
                return
            except BrokenPipeError:
                raise
            except Exception as error:  # an hour of conversation outlives whatever went wrong
                self._chat.fail(as_pop_error(error))

    def _next(self) -> None:
        line = self._read_line()
        if not line.strip():
            return
        if not line.startswith("/"):
            self._chat.ask(line.strip())
            return
        try:
            obey(self._chat, line)
        except EditRequest as request:
            self._edit(request.text)

    def _edit(self, text: str) -> None:
        edited = self._read_line(text).strip()
        if edited:
            self._chat.answer(partial(self._chat.session.edit, edited))
        else:
            self._chat.screen.note("Nothing is changed.")
