"""The slash commands of the chat."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pop_converter.base.nearest import nearest_hint
from pop_local.engine.llama.backend import Mode
from pop_local.ui.chat import attach, params, refill, sessions
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.model_notes import (
    pruning_state,
    warn_of_base_model,
    warn_of_hidden_pictures,
)
from pop_local.ui.views.stats import learned_lines, session_lines

HELP_NOTES = (
    "Ctrl-C stops an answer.",
    "A line with a leading space is always a question, never a command.",
    'Alt-Enter starts a new line; so does Enter between """ and """.',
)


class LeaveRequest(Exception):  # noqa: N818 (no error)
    """Raised to leave the chat."""


class EditRequest(Exception):  # noqa: N818 (no error)
    """Raised to edit a question and send it; `text` is the old one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def obey(chat: Dialogue, line: str) -> None:
    """Run a slash command. Raises PopError, LeaveRequest and EditRequest."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is not None:
        command.action(chat, argument.strip())
        return
    hint = nearest_hint(name, {known: known for known in COMMANDS})
    chat.refuse(f"Unknown command {name}: {hint or '/help lists the commands.'}")


def _full(chat: Dialogue, argument: str) -> None:
    modes = {"on": Mode.OFF, "off": Mode.CONTEXT}
    if argument and argument.lower() not in modes:
        chat.refuse(f"/full accepts on or off, not {argument}.")
        return
    if argument:
        chat.model.engine.set_mode(modes[argument.lower()])
    chat.screen.note(pruning_state(chat.model))


def _stats(chat: Dialogue, argument: str) -> None:
    chat.screen.note(pruning_state(chat.model))
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
        chat.screen.note("System prompt set.")
    elif chat.session.system:
        for line in f"System prompt: {chat.session.system}".splitlines():
            chat.screen.note(line)
    else:
        chat.screen.note("No system prompt.")


def _clear(chat: Dialogue, argument: str) -> None:
    chat.forget()
    chat.screen.note("Conversation cleared.")


def _retry(chat: Dialogue, argument: str) -> None:
    if chat.session.last_asked is None:
        chat.refuse("No question yet.")
    else:
        chat.answer(chat.session.retry)


def _undo(chat: Dialogue, argument: str) -> None:
    if turn := chat.session.undo():
        chat.screen.note(f"Dropped: {_short(turn.question)}")
    else:
        chat.refuse("No turn to drop.")


def _edit(chat: Dialogue, argument: str) -> None:
    turn = chat.session.last_asked
    if turn is not None:
        raise EditRequest(turn.question)
    chat.refuse("No question yet.")


def _model(chat: Dialogue, argument: str) -> None:
    if argument:
        path = attach.given_path(argument)
        chat.reopen(str(path) if path.is_file() else argument, None)
        warn_of_base_model(chat)
        warn_of_hidden_pictures(chat)
    header = chat.model.engine.context.header
    known = (header.get("general.name"), header.get("general.architecture"))
    label = ", ".join(str(part) for part in known if part)
    chat.screen.note(f"{chat.model.engine.context.path} ({label})")
    chat.screen.note(f"Context: {chat.model.engine.context.n_ctx:,} tokens.")
    chat.screen.note(pruning_state(chat.model))


def _context(chat: Dialogue, argument: str) -> None:
    n_used, n_ctx = attach.count_used(chat), chat.model.engine.context.n_ctx
    chat.screen.note(f"Context: {n_used:,} of {n_ctx:,} tokens used ({n_used / n_ctx:.0%}).")
    for number, turn in enumerate(chat.session.conversation.turns, start=1):
        n_question = attach.count_tokens(chat, turn.prompt)
        n_question += sum(map(chat.model.engine.prompter.count_picture, turn.pictures))
        n_answer = attach.count_tokens(chat, turn.answer)
        chat.screen.note(
            f"{number}. question {n_question:,}, answer {n_answer:,}: {_short(turn.question)}"
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
    """A slash command; `action` receives its argument, `words` completes it."""

    usage: str
    help: str
    action: Callable[[Dialogue, str], None]
    words: Callable[[], Iterable[str]] = tuple


_ALL = (
    Command("/help", "show this list", _help),
    Command(
        "/full on|off", "read prompts with all layers, or skip some", _full, lambda: ("on", "off")
    ),
    Command(
        "/refill idle|off",
        "let pruned tokens catch up while you type; alone: show progress",
        refill.set_mode,
        lambda: refill.MODES,
    ),
    Command("/stats", "show figures of the last answer and of all", _stats),
    Command("/context", "show the context's contents", _context),
    Command("/file PATH", "attach a file to the next question", attach.attach_file),
    Command("/image PATH", "attach a picture to the next question", attach.attach_image),
    Command("/glob PATTERN", "attach several files", attach.attach_glob),
    Command("/retry", "answer the last question again", _retry),
    Command("/undo", "drop the last question and its answer", _undo),
    Command("/edit", "edit the last question and ask it again", _edit),
    Command("/clear", "drop the conversation, keep the system prompt", _clear),
    Command("/system TEXT", "set the system prompt; alone: show it", _system),
    Command(
        "/set PARAM VALUE",
        "set a sampling parameter; alone: show all",
        params.set_param,
        lambda: params.PARAMS,
    ),
    Command("/model NAME", "switch to another model; alone: show it", _model),
    Command("/save NAME", "save the session", sessions.save, lambda: sessions.saved().names()),
    Command("/load NAME", "continue a session", sessions.load, lambda: sessions.saved().names()),
    Command("/sessions", "list the saved sessions", sessions.show),
    Command("/exit", "quit (also Ctrl-D)", _leave),
)
COMMANDS = {command.usage.partition(" ")[0]: command for command in _ALL}
