"""The chat loop: reads lines, obeys the slash commands, keeps the conversation.

It knows neither the terminal nor llama.cpp: lines come from a callback, answers from a ChatModel,
and what is to be seen goes to a Screen.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pop_converter.errors import PopError

from pop_local.engine.backend import Mode
from pop_local.engine.turn import Chunk, Message, TurnStats
from pop_local.ui.interrupt import Interrupt, deferred_interrupt
from pop_local.ui.progress import Advance
from pop_local.ui.screen import Screen, showing_prefill
from pop_local.ui.stats import session_lines, stats_line, unread_line


class ChatModel(Protocol):
    """What the loop needs of an engine's model."""

    @property
    def boundary(self) -> int: ...

    pop_mode: Mode

    def set_pop(self, mode: Mode) -> None: ...

    def n_ctx(self) -> int: ...

    def chat_turn(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]: ...


LEAVE_HINT = "To leave, type /exit or press Ctrl-D."
HELP_NOTES = (
    "Ctrl-C stops an answer.",
    "A line that begins with a space is sent even if it looks like a command.",
)


class LeaveRequest(Exception):  # noqa: N818 (no error)
    """The user is done."""


class Repl:
    """One conversation; `run` returns when the user leaves or the input ends."""

    def __init__(
        self,
        model: ChatModel,
        read_line: Callable[[], str],
        screen: Screen,
        *,
        system: str = "",
        sampling: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._read_line = read_line
        self._screen = screen
        self._system = system
        self._sampling = sampling
        self._turns: list[Message] = []
        self._stats: list[TurnStats] = []

    def run(self) -> None:
        while True:
            try:
                self._obey(self._read_line())
            except KeyboardInterrupt:
                self._screen.note(LEAVE_HINT)
            except (EOFError, LeaveRequest):
                return

    def _obey(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._turn(line.strip())
            return
        name, _, argument = line.strip().partition(" ")
        command = COMMANDS.get(name.lower())
        if command is None:
            self._unknown(name)
        else:
            command.action(self, argument.strip())

    def _unknown(self, name: str) -> None:
        near = difflib.get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else "/help lists the commands."
        self._screen.note(f"There is no command {name}: {advice}")

    def _pop(self, argument: str) -> None:
        modes = {"on": Mode.CONTEXT, "off": Mode.OFF}
        if argument and argument.lower() not in modes:
            self._screen.note(f"/pop takes on or off, not {argument}.")
            return
        if argument:
            try:
                self._model.set_pop(modes[argument.lower()])
            except PopError as error:
                self._screen.error(error)
                return
        self._screen.note(self.pop_state())

    def pop_state(self) -> str:
        """Whether prompts are pruned, in a sentence."""
        if not self._model.boundary:
            return "Pruning is not possible: this model is not converted."
        if self._model.pop_mode is Mode.OFF:
            return "Pruning is off: prompts are read in full."
        return f"Pruning is on: context tokens skip the layers from {self._model.boundary} on."

    def _show_stats(self, argument: str) -> None:
        self._screen.note(self.pop_state())
        for line in session_lines(self._stats, self._model.n_ctx()):
            self._screen.note(line)

    def _clear(self, argument: str) -> None:
        self._turns.clear()
        self._stats.clear()
        self._screen.note("The conversation is forgotten.")

    def _set_system(self, argument: str) -> None:
        if argument:
            self._system = argument
            self._screen.note("The system prompt is set.")
        elif self._system:
            self._screen.note(f"The system prompt is: {self._system}")
        else:
            self._screen.note("There is no system prompt.")

    def _help(self, argument: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self._screen.note(f"{command.usage.ljust(width)}  {command.help}")
        for line in HELP_NOTES:
            self._screen.note(line)

    def _leave(self, argument: str) -> None:
        raise LeaveRequest

    def _turn(self, text: str) -> None:
        system = [Message("system", self._system)] if self._system else []
        question = Message("user", text)
        said: list[str] = []
        try:
            with deferred_interrupt() as interrupt:
                self._answer([*system, *self._turns, question], said, interrupt)
        except KeyboardInterrupt:
            self._screen.note("Stopped.")
        except PopError as error:
            self._screen.error(error)
        # What was said before Ctrl-C stays said, and its KV cache stays useful.
        if said:
            self._turns += [question, Message("assistant", "".join(said))]
        else:
            self._screen.note("The question is dropped.")

    def _answer(self, messages: Sequence[Message], said: list[str], interrupt: Interrupt) -> None:
        """Shows the answer and collects it in `said`, whatever ends it."""

        def start(advance: Advance) -> Iterator[Chunk]:
            return self._model.chat_turn(
                messages,
                on_prefill=advance,
                should_stop=lambda: interrupt.asked,
                **self._sampling,
            )

        stats: TurnStats | None = None
        try:
            for chunk in showing_prefill(self._screen, start):
                stats = chunk.stats
                if chunk.text:
                    said.append(chunk.text)
                    self._screen.text(chunk.text)
        finally:
            if said:
                self._screen.end_answer()
        if stats is not None:
            self._finish(stats)

    def _finish(self, stats: TurnStats) -> None:
        if stats.n_decoded == 0:
            self._screen.note(unread_line(stats))
            return
        self._stats.append(stats)
        self._screen.note(stats_line(stats))
        if stats.n_prompt + stats.n_decoded >= self._model.n_ctx():
            self._screen.note("The context is full: /clear, or start with a larger one (--ctx).")


@dataclass(frozen=True)
class Command:
    """A slash command; the action gets what follows its name."""

    usage: str
    help: str
    action: Callable[[Repl, str], None]


COMMANDS = {
    "/pop": Command("/pop on|off", "skip layers while reading, or read all in full", Repl._pop),
    "/stats": Command("/stats", "figures of this conversation", Repl._show_stats),
    "/clear": Command("/clear", "forget the conversation, keep the system prompt", Repl._clear),
    "/system": Command("/system TEXT", "set the system prompt; alone: show it", Repl._set_system),
    "/help": Command("/help", "this list", Repl._help),
    "/exit": Command("/exit", "leave (Ctrl-D does too)", Repl._leave),
}
