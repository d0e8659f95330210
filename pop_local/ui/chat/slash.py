"""The chat's slash commands."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_local.config.settings import SAMPLING, find, parse
from pop_local.engine.llama.backend import Mode
from pop_local.engine.turn_options import TurnOptions
from pop_local.ui.chat import attach, refill, sessions
from pop_local.ui.chat.dialogue import (
    Dialogue,
    pruning_state,
    warn_of_base_model,
    warn_of_hidden_pictures,
)
from pop_local.ui.views.stats import session_lines

HELP_NOTES = (
    "Ctrl-C stops an answer. Alt-Enter starts a new line.",
    "To ask a question that starts with /, type a space before the slash.",
)
# Names that Ollama and shells use for these commands.
ALIASES = {
    **dict.fromkeys(("?", "/?"), "/help"),
    **dict.fromkeys(("exit", "quit", "/quit", "/bye"), "/exit"),
}
_FULL = {"on": Mode.OFF, "off": Mode.CONTEXT}
# The parameters that /set accepts, which are fields of TurnOptions.
_PARAMS = {**SAMPLING, "max_tokens": find("max_tokens")}
_DEFAULT = "default"
_DEFAULTS = TurnOptions()


def run_command(chat: Dialogue, line: str) -> None:
    """Run a slash command. Raises PopError, or EOFError if the command ends the chat."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(name.lower(), name.lower()))
    if command is not None:
        command.action(chat, argument.strip())
        return
    hint = nearest_hint(name, {command: command for command in COMMANDS})
    chat.refuse(f"Unknown command {name}: {hint or '/help lists the commands.'}")


def _full(chat: Dialogue, argument: str) -> None:
    if argument and argument.lower() not in _FULL:
        chat.refuse(f"/full accepts on or off, not {argument}.")
        return
    if argument:
        chat.model.engine.set_mode(_FULL[argument.lower()], keeps_exact=True)
    chat.screen.note(pruning_state(chat.model))


def _stats(chat: Dialogue, argument: str) -> None:
    chat.screen.note(pruning_state(chat.model))
    engine = chat.model.engine
    answers, n_refilled = chat.session.answer_stats, engine.sequences[0].refiller.n_refilled
    lines = [*session_lines(answers, engine.context.n_ctx, n_refilled)]
    for line in filter(None, [*lines, refill.status(chat)]):
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
        chat.screen.note(f"Dropped: {sessions.short(turn.question)}")
    else:
        chat.refuse("There are no turns to remove.")


def _set(chat: Dialogue, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if not name:
        for key in _PARAMS:
            chat.screen.note(_param_line(chat, key))
        return
    param = _PARAMS.get(name.lower())
    if param is None:
        hint = nearest_hint(name, {key: key for key in _PARAMS}, "/set lists all parameters.")
        chat.refuse(f"Unknown parameter {name}: {hint}")
        return
    name, text = name.lower(), text.strip()
    if text == _DEFAULT:
        chat.sampling.pop(name, None)
    elif text:
        try:
            chat.sampling[name] = parse(param, text)
        except PopError as error:
            chat.refuse(f"{name}: {error.message} or {_DEFAULT!r}.")
            return
    chat.screen.note(_param_line(chat, name))


def _param_line(chat: Dialogue, name: str) -> str:
    if name in chat.sampling:
        return f"{name} is {_shown(chat.sampling[name])}."
    recommended = chat.model.engine.recommended
    if name in recommended:
        return f"{name} is {_shown(recommended[name])} (recommended for this model)."
    unset = {"max_tokens": "unlimited", "seed": "random"}
    return f"{name} is {unset.get(name) or _shown(getattr(_DEFAULTS, name))} (default)."


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _model(chat: Dialogue, argument: str) -> None:
    if argument:
        path = attach.given_path(argument)
        chat.reopen(str(path) if path.is_file() else argument, None)
        warn_of_base_model(chat.screen, chat.model)
        warn_of_hidden_pictures(chat)
    context = chat.model.engine.context
    titles = map(context.files.header.get, ("general.name", "general.architecture"))
    chat.screen.note(f"{context.files.path} ({', '.join(str(title) for title in titles if title)})")
    chat.screen.note(f"Context: {context.n_ctx:,} tokens.")
    chat.screen.note(pruning_state(chat.model))


def _help(chat: Dialogue, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.screen.note(f"{command.usage.ljust(width)}  {command.help}")
    for line in HELP_NOTES:
        chat.screen.note(line)


def _leave(chat: Dialogue, argument: str) -> None:
    raise EOFError


@dataclass(frozen=True)
class Command:
    """A slash command. `action` receives the argument, and `words` returns completions for it."""

    usage: str
    help: str
    action: Callable[[Dialogue, str], None]
    words: Callable[[], Iterable[str]] = tuple


_ALL = (
    Command("/help", "show this list (? does the same)", _help),
    Command("/file PATH", "add a file's text to the next question", attach.attach_file),
    Command("/image PATH", "add an image to the next question", attach.attach_image),
    Command("/full on|off", "use full reading (on) or fast reading (off)", _full, _FULL.keys),
    Command("/retry", "regenerate the last answer", _retry),
    Command("/undo", "remove the last question and its answer", _undo),
    Command("/clear", "start over with the same system prompt", _clear),
    Command("/save NAME", "save the chat", sessions.save, lambda: sessions.saved().names()),
    Command(
        "/load NAME",
        "continue a saved chat, or list saved chats",
        sessions.load,
        lambda: sessions.saved().names(),
    ),
    Command("/model NAME", "switch models, or show the current model", _model),
    Command("/system TEXT", "set or show the system prompt", _system),
    Command("/set PARAM VALUE", "set a parameter, or list all parameters", _set, _PARAMS.keys),
    Command("/stats", "show speed, token counts, and context usage", _stats),
    Command("/exit", "quit (/bye, exit, and Ctrl-D do the same)", _leave),
)
COMMANDS = {command.usage.partition(" ")[0]: command for command in _ALL}
