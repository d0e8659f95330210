"""Keeps an unsaved conversation through a crash, a kill or a closed terminal.

Every chat keeps its transcript, without K/V, in a file beside a lock, and removes both when it
ends. A file whose lock nobody holds belongs to a chat that died.
"""

import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

from pop_converter.base.output_file import make_private
from pop_local.engine.sessions.chat_session import load_session
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.sessions.session_file import SavedFile, Sessions
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.error_output import as_pop_error

_CHOICES = {"g": "go on with it", "d": "delete it", "k": "keep it, to be asked again"}


class Unsaved:
    """This chat's transcript in `folder`, removed when the block ends without an exception."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions = Sessions(folder)
        self._name = f"{time.strftime('%Y-%m-%d %H.%M.%S')} {token_hex(4)}"
        self._lock = FileLock(self._lock_of(self._name), timeout=0, mode=0o600)
        self._kept: Conversation | None = None
        self._is_possible = True

    def __enter__(self) -> "Unsaved":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Ctrl-C ends piped lines as they are meant to be ended.
        if kind in (None, KeyboardInterrupt) and self._lock.is_locked:
            self._remove(self._name)
        self._lock.release(force=True)

    def keep(self, chat: Dialogue) -> None:
        """Save the transcript if it has changed; warn once if that fails."""
        said = chat.session.conversation
        if not self._is_possible or said is self._kept or not (said.turns or self._kept):
            return
        self._kept = said
        try:
            make_private(self._folder)
            self._lock.acquire()
            self._sessions.save_transcript(self._name, chat.model.engine, said)
        except Exception as error:
            self._is_possible = False
            reason = as_pop_error(error).message
            chat.screen.warn(f"A crash would lose this conversation, unless you /save it: {reason}")

    def offer(self, chat: Dialogue) -> None:
        """Offer the conversations of chats that died, the last one first.

        It ends when the user goes on with one, or does not answer.
        """
        try:
            for stored in reversed(list(self._sessions.listed())):
                with suppress(Timeout), FileLock(self._lock_of(stored.name), timeout=0, mode=0o600):
                    if stored.session and self._is_last(chat, stored):
                        return
        except Exception as error:
            chat.fail(as_pop_error(error))

    def _is_last(self, chat: Dialogue, stored: SavedFile) -> bool:
        assert stored.session is not None
        n_turns = len(stored.session.conversation.turns)
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.changed_s))
        what = f"A chat ended unexpectedly on {day}; it has {n_turns} turn{'s' * (n_turns != 1)}."
        chosen = chat.screen.choose(what, _CHOICES)
        if chosen == "g":
            self._go_on(chat, stored.name)
        if chosen == "d" or (chosen == "g" and self._is_possible):
            self._remove(stored.name)
        return chosen in ("g", None)

    def _go_on(self, chat: Dialogue, name: str) -> None:
        before = chat.model.engine.cache.mode
        chat.resume(load_session(chat.model, self._sessions.path(name)), "")
        self.keep(chat)
        chat.screen.note("It is read again with your next question.")
        if chat.model.engine.cache.mode is not before:
            chat.screen.note(chat.pop_state())

    def _remove(self, name: str) -> None:
        for path in (self._sessions.path(name), self._lock_of(name)):
            with suppress(OSError):
                path.unlink()

    def _lock_of(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
