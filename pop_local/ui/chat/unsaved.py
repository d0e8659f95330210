"""Recovery of unsaved conversations after a crash.

Every chat stores its transcript, without the KV cache, in a file with a lock, and removes both when
it ends. A file without a locked lock belongs to a chat that crashed.
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
from pop_local.ui.chat.model_notes import pruning_state
from pop_local.ui.error_output import as_pop_error

_CHOICES = {"c": "continue it", "d": "delete it", "k": "keep it and ask again later"}


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
        # Ctrl-C is a normal end of piped lines.
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
            chat.screen.warn(f"A crash would lose this conversation ({reason}); /save it.")

    def offer(self, chat: Dialogue) -> None:
        """Offer the conversations of crashed chats, the newest first, until the user picks one."""
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
        what = f"A chat with {n_turns} turn{'s' * (n_turns != 1)} ended unexpectedly on {day}."
        chosen = chat.screen.choose(what, _CHOICES)
        if chosen == "c":
            self._continue(chat, stored.name)
        if chosen == "d" or (chosen == "c" and self._is_possible):
            self._remove(stored.name)
        return chosen in ("c", None)

    def _continue(self, chat: Dialogue, name: str) -> None:
        before = chat.model.engine.pruning.mode
        chat.resume(load_session(chat.model, self._sessions.path(name)), "")
        self.keep(chat)
        chat.screen.note("It will be read again with your next question.")
        if chat.model.engine.pruning.mode is not before:
            chat.screen.note(pruning_state(chat.model))

    def _remove(self, name: str) -> None:
        for path in (self._sessions.path(name), self._lock_of(name)):
            with suppress(OSError):
                path.unlink()

    def _lock_of(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
