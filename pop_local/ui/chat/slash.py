"""The slash commands of the chat."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from converter.errors import PopError
from pop_local.config.nearest import nearest_hint
from pop_local.engine.llama.backend import Mode
from pop_local.ui.chat import attach, params, sessions
from pop_local.ui.chat.chat import Chat
from pop_local.ui.views.stats import session_lines

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


def obey(chat: Chat, line: str) -> None:
    """Raises LeaveRequest and EditRequest, which only the reader of lines can follow."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is not None:
        command.action(chat, argument.strip())
        return
    hint = nearest_hint(name, {known: known for known in COMMANDS})
    chat.has_failed = True
    chat.screen.note(f"There is no command {name}: {hint or '/help lists the commands.'}")


def _pop(chat: Chat, argument: str) -> None:
    modes = {"on": Mode.CONTEXT, "off": Mode.OFF}
    if argument and argument.lower() not in modes:
        chat.screen.note(f"/pop takes on or off, not {argument}.")
        return
    if argument:
        try:
            chat.model.set_pop(modes[argument.lower()])
        except PopError as error:
            chat.fail(error)
            return
    chat.screen.note(chat.pop_state())


def _stats(chat: Chat, argument: str) -> None:
    chat.screen.note(chat.pop_state())
    for line in session_lines(chat.stats, chat.model.n_ctx(), chat.costs.of):
        chat.screen.note(line)


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation = replace(chat.conversation, system=argument)
        chat.screen.note("The system prompt is set.")
    elif chat.conversation.system:
        for line in f"The system prompt is: {chat.conversation.system}".splitlines():
            chat.screen.note(line)
    else:
        chat.screen.note("There is no system prompt.")


def _clear(chat: Chat, argument: str) -> None:
    chat.forget()
    chat.screen.note("The conversation is forgotten.")


def _retry(chat: Chat, argument: str) -> None:
    if chat.dropped is not None:
        chat.answer(chat.dropped)
    elif chat.conversation.turns:
        turn = chat.conversation.turns[-1]
        chat.conversation = chat.conversation.without_last()
        chat.answer(replace(turn, answer=""))
    else:
        chat.screen.note("Nothing has been asked yet.")


def _undo(chat: Chat, argument: str) -> None:
    if not chat.conversation.turns:
        chat.screen.note("There is no turn to drop.")
        return
    question = chat.conversation.turns[-1].question
    chat.conversation = chat.conversation.without_last()
    chat.dropped = None
    chat.screen.note(f"Dropped: {_short(question)}")


def _edit(chat: Chat, argument: str) -> None:
    if chat.dropped is not None:
        raise EditRequest(chat.dropped.question)
    if not chat.conversation.turns:
        chat.screen.note("Nothing has been asked yet.")
        return
    raise EditRequest(chat.conversation.turns[-1].question)


def ask_edited(chat: Chat, question: str) -> None:
    """The last question in its new form, about the same files; its old answer is dropped."""
    turn = chat.dropped or chat.conversation.turns[-1]
    if chat.dropped is None:
        chat.conversation = chat.conversation.without_last()
    chat.answer(replace(turn, question=question, answer=""))


def _model(chat: Chat, argument: str) -> None:
    if argument:
        try:
            chat.reopen(argument, None)
        except PopError as error:
            chat.fail(error)
            return
        chat.warn_of_base()
    metadata = chat.model.metadata
    name = metadata.get("general.name", "")
    label = ", ".join(part for part in (name, metadata.get("general.architecture", "")) if part)
    chat.screen.note(f"{chat.model.model_path} ({label})")
    chat.screen.note(f"Its context holds {chat.model.n_ctx():,} tokens.")
    chat.screen.note(chat.pop_state())


def _context(chat: Chat, argument: str) -> None:
    n_used, n_ctx = chat.n_used, chat.model.n_ctx()
    chat.screen.note(f"{n_used:,} of {n_ctx:,} tokens are used ({n_used / n_ctx:.0%}).")
    for number, turn in enumerate(chat.conversation.turns, start=1):
        n_asked, n_said = chat.count_tokens(turn.prompt), chat.count_tokens(turn.answer)
        chat.screen.note(
            f"{number}. {n_asked:,} asked, {n_said:,} answered: {_short(turn.question)}"
        )
    if chat.documents:
        attach.attach_file(chat, "")


def _help(chat: Chat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.screen.note(f"{command.usage.ljust(width)}  {command.help}")
    for line in HELP_NOTES:
        chat.screen.note(line)


def _leave(chat: Chat, argument: str) -> None:
    raise LeaveRequest


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _no_words() -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Command:
    """The action gets what follows the command's name; `words` are offered there."""

    usage: str
    help: str
    action: Callable[[Chat, str], None]
    words: Callable[[], Iterable[str]] = _no_words


COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/pop": Command(
        "/pop on|off", "skip layers while reading, or read all in full", _pop, lambda: ("on", "off")
    ),
    "/stats": Command("/stats", "figures of the last answer and of all", _stats),
    "/context": Command("/context", "what fills the context", _context),
    "/file": Command("/file PATH", "read a file with the next question", attach.attach_file),
    "/glob": Command("/glob PATTERN", "the same for several files", attach.attach_glob),
    "/retry": Command("/retry", "answer the last question again", _retry),
    "/undo": Command("/undo", "drop the last question and its answer", _undo),
    "/edit": Command("/edit", "change the last question and ask it again", _edit),
    "/clear": Command("/clear", "forget the conversation, keep the system prompt", _clear),
    "/system": Command("/system TEXT", "set the system prompt; alone: show it", _system),
    "/set": Command(
        "/set PARAM VALUE", "how answers are sampled", params.set_param, lambda: params.PARAMS
    ),
    "/model": Command("/model NAME", "take another model; alone: show it", _model),
    "/save": Command(
        "/save NAME", "save the session", sessions.save, lambda: sessions.saved().names()
    ),
    "/load": Command(
        "/load NAME", "go on with a session", sessions.load, lambda: sessions.saved().names()
    ),
    "/sessions": Command("/sessions", "list the saved sessions", sessions.show),
    "/exit": Command("/exit", "leave (Ctrl-D does too)", _leave),
}
