"""/save, /load and /sessions."""

import time

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_converter.base.numbers import size
from pop_local.config.settings import sessions_dir
from pop_local.engine.sessions.chat_session import load_session
from pop_local.engine.sessions.session_file import Sessions
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.model_notes import pruning_state, warn_of_hidden_pictures
from pop_local.ui.chat.refill import finish


def saved() -> Sessions:
    return Sessions(sessions_dir())


def save(chat: Dialogue, name: str) -> None:
    if not name:
        chat.refuse("/save needs a name.")
        return
    path = saved().path(name)
    if path.exists() and chat.saved_as != name:
        choices = {"r": "replace it", "k": "keep it and save nothing"}
        if chat.screen.choose(f"Session {name} already exists.", choices) != "r":
            chat.refuse("Nothing was saved.")
            return
    finish(chat)
    n_bytes = chat.session.save(path, overwrite=True).stat().st_size
    chat.saved_as = name
    chat.screen.note(f"Saved as {name} ({size(n_bytes)}); /load {name} continues from here.")


def load(chat: Dialogue, name: str) -> None:
    if not name:
        chat.refuse("/load needs a session name; /sessions lists them.")
        return
    sessions, before = saved(), chat.model.engine.pruning.mode
    path = sessions.path(name)
    if not path.is_file():
        known = {known: known for known in sessions.names()}
        raise PopError(
            f"no session named {name}", nearest_hint(name, known, "/sessions lists them")
        )
    session = load_session(chat.model, path)
    chat.resume(session, name)
    n_turns = len(session.conversation.turns)
    chat.screen.note(f"Loaded {name}: {n_turns} turn{'' if n_turns == 1 else 's'}.")
    if session.reread:
        chat.screen.warn(
            f"Cannot reuse its KV cache: {session.reread}. The transcript will be read again with"
            " your next question."
        )
    else:
        chat.screen.note(f"{session.n_cached:,} tokens are cached and need no reading.")
    warn_of_hidden_pictures(chat)
    if chat.model.engine.pruning.mode is not before:
        chat.screen.note(pruning_state(chat.model))


def show(chat: Dialogue, argument: str) -> None:
    listed = list(saved().listed())
    if not listed:
        chat.screen.note("No saved sessions; /save NAME saves this one.")
    for stored in listed:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.changed_s))
        what = "damaged"
        if stored.session is not None:
            n_turns = len(stored.session.conversation.turns)
            turns = "1 turn" if n_turns == 1 else f"{n_turns} turns"
            what = f"{turns}, {stored.session.n_tokens:,} tokens, {stored.session.model}"
        chat.screen.note(f"{stored.name}: {what}, {size(stored.size_bytes)}, {day}")
