"""The chat's session files: /save, /load, and recovery after a crash."""

import time
from contextlib import suppress
from secrets import token_hex

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_base.numbers import size
from pop_local.config.settings import sessions_dir
from pop_local.engine.sessions.chat_session import load_session
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.sessions.session_file import Sessions, write_session
from pop_local.ui.chat.dialogue import Dialogue, pruning_state, warn_of_hidden_pictures
from pop_local.ui.error_output import as_pop_error

_UNSAVED = "unsaved "


def saved() -> Sessions:
    return Sessions(sessions_dir())


def save(chat: Dialogue, name: str) -> None:
    if not name:
        chat.refuse("/save needs a name.")
        return
    path = saved().path(name)
    if path.exists() and chat.saved_as != name:
        choices = {"r": "replace it", "k": "keep the existing session"}
        if chat.screen.choose(f"Session {name} already exists.", choices) != "r":
            chat.refuse("Nothing was saved.")
            return
    n_bytes = chat.session.save(path, overwrite=True).stat().st_size
    chat.saved_as = name
    chat.screen.note(f"Saved {name} ({size(n_bytes)}). To restore the session, type /load {name}.")


def load(chat: Dialogue, name: str) -> None:
    """Load a session, or list the saved sessions if no name is given."""
    if not name:
        _list(chat)
        return
    sessions, before = saved(), chat.model.engine.sequences[0].settings.mode
    path = sessions.path(name)
    if not path.is_file():
        hint = nearest_hint(
            name, {stored: stored for stored in sessions.names()}, "/load lists the sessions"
        )
        raise PopError(f"no session is named {name}", hint)
    session = load_session(chat.model.engine, path)
    chat.resume(session, name)
    chat.screen.note(f"Loaded {name}: {_turns(len(session.conversation.turns))}.")
    if session.reread:
        chat.screen.warn(
            f"The session's KV cache cannot be used because {session.reread}. The model will read"
            " the transcript again before the next answer."
        )
    warn_of_hidden_pictures(chat)
    if chat.model.engine.sequences[0].settings.mode is not before:
        chat.screen.note(pruning_state(chat.model))


def _list(chat: Dialogue) -> None:
    listed = list(saved().listed())
    if not listed:
        chat.screen.note("No saved sessions yet. To save this session, type /save NAME.")
    for stored in listed:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.changed_s))
        what = "damaged"
        if session := stored.session:
            n_turns = len(session.conversation.turns)
            what = f"{_turns(n_turns)}, {session.model}"
        chat.screen.note(f"{stored.name}: {what}, {size(stored.size_bytes)}, {changed}")


def _turns(n_turns: int) -> str:
    return "1 turn" if n_turns == 1 else f"{n_turns} turns"


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


class Autosave:
    """The running chat's transcript, a session that exists only until the chat ends normally.

    A session that is left over belongs to a chat that crashed, or that is still open.
    """

    def __init__(self) -> None:
        self._name = f"{_UNSAVED}{time.strftime('%Y-%m-%d %H.%M.%S')} {token_hex(4)}"
        self._conversation: Conversation | None = None
        self._is_possible = True

    def keep(self, chat: Dialogue) -> None:
        """Save the transcript if it has changed. Remove it if the conversation is empty.

        If saving fails, warns the user and disables automatic saving.
        """
        conversation = chat.session.conversation
        if not self._is_possible or conversation is self._conversation:
            return
        self._conversation = conversation
        if chat.saved_as.startswith(_UNSAVED):  # continue the file of a chat that crashed
            self._name = chat.saved_as
        if not conversation.turns:
            self.remove()
            return
        try:
            write_session(saved().path(self._name), chat.model.engine, conversation)
        except Exception as error:
            self._is_possible = False
            reason = as_pop_error(error).message
            chat.screen.warn(
                f"This chat cannot be saved automatically ({reason}). To save it, type /save NAME."
            )

    def remove(self) -> None:
        with suppress(OSError):
            saved().path(self._name).unlink()


def note_unsaved(chat: Dialogue) -> None:
    """Show how to continue the latest chat that did not end normally, if any."""
    names = [name for name in saved().names() if name.startswith(_UNSAVED)]
    if names:
        chat.screen.note(
            "An earlier chat ended unexpectedly or is still open. To continue the chat, type"
            f" /load {names[-1]}."
        )
