"""The slash commands of the chat."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pop_converter.base.nearest import nearest_hint
from pop_local.engine.llama.backend import Mode
from pop_local.ui.chat import attach, params, refill, sessions
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.views.stats import learned_lines, session_lines

HELP_NOTES = (
    "Ctrl-C stops an answer.",
    "A line that begins with a space is sent even if it looks like a command.",
    'Alt-Enter makes a new line; so does Enter after """, until the closing """.',
)


class LeaveRequest(Exception):  # noqa: N818 (no error)
    """The user is done."""


class EditRequest(Exception):  # noqa: N818 (no error)
    """The user wants to change a line and send it; `text` is the old one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def obey(chat: Dialogue, line: str) -> None:
    """Obey a line that begins with a slash.

    Raises PopError, and LeaveRequest and EditRequest for the reader of lines.
    """
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is not None:
        command.action(chat, argument.strip())
        return
    hint = nearest_hint(name, {known: known for known in COMMANDS})
    chat.refuse(f"There is no command {name}: {hint or '/help lists the commands.'}")


def _full(chat: Dialogue, argument: str) -> None:
    modes = {"on": Mode.OFF, "off": Mode.CONTEXT}
    if argument and argument.lower() not in modes:
        chat.refuse(f"/full takes on or off, not {argument}.")
        return
    if argument:
        chat.model.engine.set_mode(modes[argument.lower()])
    chat.screen.note(chat.pop_state())


def _stats(chat: Dialogue, argument: str) -> None:
    chat.screen.note(chat.pop_state())
    for line in session_lines(
        chat.session.answer_stats, chat.model.engine.context.n_ctx, chat.costs.of
    ):
        chat.screen.note(line)
    if (calibrator := chat.model.engine.calibrator) is not None:
        for line in learned_lines(calibrator.learned, chat.teacher.loss if chat.teacher else None):
            chat.screen.note(line)


def _system(chat: Dialogue, argument: str) -> None:
    if argument:
        chat.session.system = argument
        chat.screen.note("The system prompt is set.")
    elif chat.session.system:
        for line in f"The system prompt is: {chat.session.system}".splitlines():
            chat.screen.note(line)
    else:
        chat.screen.note("There is no system prompt.")


def _clear(chat: Dialogue, argument: str) -> None:
    chat.forget()
    chat.screen.note("The conversation is forgotten.")


def _retry(chat: Dialogue, argument: str) -> None:
    if chat.session.last_asked is None:
        chat.refuse("Nothing has been asked yet.")
    else:
        chat.answer(chat.session.retry)


def _undo(chat: Dialogue, argument: str) -> None:
    if turn := chat.session.undo():
        chat.screen.note(f"Dropped: {_short(turn.question)}")
    else:
        chat.refuse("There is no turn to drop.")


def _edit(chat: Dialogue, argument: str) -> None:
    turn = chat.session.last_asked
    if turn is not None:
        raise EditRequest(turn.question)
    chat.refuse("Nothing has been asked yet.")


def _model(chat: Dialogue, argument: str) -> None:
    if argument:
        path = attach.given_path(argument)
        chat.reopen(str(path) if path.is_file() else argument, None)
        chat.warn_of_base()
        chat.warn_of_blindness()
    header = chat.model.engine.context.header
    known = (header.get("general.name"), header.get("general.architecture"))
    label = ", ".join(str(part) for part in known if part)
    chat.screen.note(f"{chat.model.engine.context.path} ({label})")
    chat.screen.note(f"Its context holds {chat.model.engine.context.n_ctx:,} tokens.")
    chat.screen.note(chat.pop_state())


def _context(chat: Dialogue, argument: str) -> None:
    n_used, n_ctx = chat.n_used, chat.model.engine.context.n_ctx
    chat.screen.note(f"{n_used:,} of {n_ctx:,} tokens are used ({n_used / n_ctx:.0%}).")
    for number, turn in enumerate(chat.session.conversation.turns, start=1):
        n_asked, n_said = chat.count_tokens(turn.prompt), chat.count_tokens(turn.answer)
        n_asked += sum(map(chat.model.engine.prompter.count_picture, turn.pictures))
        chat.screen.note(
            f"{number}. {n_asked:,} asked, {n_said:,} answered: {_short(turn.question)}"
        )
    if chat.documents:
        attach.attach_file(chat, "")
    if chat.pictures:
        attach.attach_image(chat, "")


def _help(chat: Dialogue, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.screen.note(f"{command.usage.ljust(width)}  {command.help}")
    for line in HELP_NOTES:
        chat.screen.note(line)


def _leave(chat: Dialogue, argument: str) -> None:
    raise LeaveRequest


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


@dataclass(frozen=True)
class Command:
    """A command; `action` gets the text after its name, and `words` are offered there."""

    usage: str
    help: str
    action: Callable[[Dialogue, str], None]
    words: Callable[[], Iterable[str]] = tuple


_ALL = (
    Command("/help", "this list", _help),
    Command(
        "/full on|off", "read in full, or skip layers while reading", _full, lambda: ("on", "off")
    ),
    Command(
        "/refill idle|off",
        "when pruned tokens run the skipped layers; alone: how far they have",
        refill.set_mode,
        lambda: refill.MODES,
    ),
    Command("/stats", "figures of the last answer and of all", _stats),
    Command("/context", "what fills the context", _context),
    Command("/file PATH", "read a file with the next question", attach.attach_file),
    Command("/image PATH", "show a picture with the next question", attach.attach_image),
    Command("/glob PATTERN", "read several files", attach.attach_glob),
    Command("/retry", "answer the last question again", _retry),
    Command("/undo", "drop the last question and its answer", _undo),
    Command("/edit", "change the last question and ask it again", _edit),
    Command("/clear", "forget the conversation, keep the system prompt", _clear),
    Command("/system TEXT", "set the system prompt; alone: show it", _system),
    Command("/set PARAM VALUE", "how answers are sampled", params.set_param, lambda: params.PARAMS),
    Command("/model NAME", "take another model; alone: show it", _model),
    Command("/save NAME", "save the session", sessions.save, lambda: sessions.saved().names()),
    Command("/load NAME", "go on with a session", sessions.load, lambda: sessions.saved().names()),
    Command("/sessions", "list the saved sessions", sessions.show),
    Command("/exit", "leave (Ctrl-D does too)", _leave),
)
COMMANDS = {command.usage.partition(" ")[0]: command for command in _ALL}
