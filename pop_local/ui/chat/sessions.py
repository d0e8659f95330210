"""The chat's session files: /save, /load, and recovery after a crash.

A running chat keeps its transcript in a locked file and removes the file at exit. An unlocked file
belongs to a chat that crashed.
"""

import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_base.numbers import size
from pop_base.output_file import make_private
from pop_local.config.settings import sessions_dir
from pop_local.engine.sessions.chat_session import load_session
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.sessions.session_file import SavedFile, Sessions, write_session
from pop_local.ui.chat.dialogue import Dialogue, pruning_state, warn_of_hidden_pictures
from pop_local.ui.error_output import as_pop_error

_CHOICES = {
    "c": "continue the chat",
    "d": "delete the chat",
    "k": "keep the chat and decide later (or press Ctrl-C)",
}


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
        what = "damaged"
        if session := stored.session:
            n_turns = len(session.conversation.turns)
            what = f"{_turns(n_turns)}, {session.model}"
        chat.screen.note(f"{stored.name}: {what}, {size(stored.size_bytes)}, {_changed(stored)}")


def _turns(n_turns: int) -> str:
    return "1 turn" if n_turns == 1 else f"{n_turns} turns"


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _changed(stored: SavedFile) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.changed_s))


class Unsaved:
    """This chat's transcript file, which is removed if the chat ends without an error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions = Sessions(folder)
        self._name = f"{time.strftime('%Y-%m-%d %H.%M.%S')} {token_hex(4)}"
        self._lock = self._lock_of(self._name)
        self._kept: Conversation | None = None
        self._is_possible = True

    def __enter__(self) -> "Unsaved":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # With piped input, Ctrl-C is a normal way to end the chat.
        if kind in (None, KeyboardInterrupt) and self._lock.is_locked:
            self._remove(self._name)
        self._lock.release(force=True)

    def keep(self, chat: Dialogue) -> None:
        """Save the transcript if it has changed. Remove it if the chat was cleared.

        If saving fails, warns the user and disables automatic saving.
        """
        said = chat.session.conversation
        if not self._is_possible or said is self._kept or not (said.turns or self._kept):
            return
        self._kept = said
        try:
            make_private(self._folder)
            self._lock.acquire()
            if not said.turns:
                self._sessions.path(self._name).unlink(missing_ok=True)
                return
            write_session(self._sessions.path(self._name), chat.model.engine, said)
        except Exception as error:
            self._is_possible = False
            reason = as_pop_error(error).message
            chat.screen.warn(
                f"This chat cannot be saved automatically ({reason}). To save it, type /save NAME."
            )

    def offer(self, chat: Dialogue) -> None:
        """Offer conversations from crashed chats, newest first, until the user resumes one."""
        try:
            crashed = [entry for entry in self._sessions.listed() if self._has_crashed(entry)]
            for n_older, stored in reversed([*enumerate(crashed)]):
                with suppress(Timeout), self._lock_of(stored.name):
                    if self._is_last(chat, stored, n_older):
                        return
        except Exception as error:
            chat.fail(as_pop_error(error))

    def _has_crashed(self, stored: SavedFile) -> bool:
        with suppress(Timeout), self._lock_of(stored.name):
            return stored.session is not None and bool(stored.session.conversation.turns)
        return False

    def _is_last(self, chat: Dialogue, stored: SavedFile, n_older: int) -> bool:
        """Offer a conversation to the user. Return True if this offer must be the last one."""
        assert stored.session is not None, "the file is damaged"
        name, turns = stored.session.model, stored.session.conversation.turns
        date, n_turns = _changed(stored), _turns(len(turns))
        question = (
            f"A chat with {name} ended unexpectedly on {date} ({n_turns})."
            f" The first question was: {short(turns[0].question)}"
        )
        if n_older:
            older = "1 older chat" if n_older == 1 else f"{n_older} older chats"
            question += f"\n{older} also ended unexpectedly. To see the next chat, type d or k."
        choice = chat.screen.choose(question, _CHOICES, enter="c")
        if choice == "c":
            before = chat.model.engine.sequences[0].settings.mode
            chat.resume(load_session(chat.model.engine, self._sessions.path(stored.name)), "")
            self.keep(chat)
            chat.screen.note("The model will read this conversation again before the next answer.")
            if chat.model.engine.sequences[0].settings.mode is not before:
                chat.screen.note(pruning_state(chat.model))
        if choice == "d" or (choice == "c" and self._is_possible):
            self._remove(stored.name)
        return choice in ("c", None)

    def _remove(self, name: str) -> None:
        for path in (self._sessions.path(name), self._folder / f"{name}.lock"):
            with suppress(OSError):
                path.unlink()

    def _lock_of(self, name: str) -> FileLock:
        return FileLock(self._folder / f"{name}.lock", timeout=0, mode=0o600)
