"""A question that does not fit the context: the user chooses, nothing is cut silently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.errors import PopError
from pop_local.engine.sessions.conversation import Turn
from pop_local.engine.turn import ContextFullError
from pop_local.ui.chat.screen import Choice

if TYPE_CHECKING:
    from pop_local.ui.chat.chat import Chat, ChatModel

_CTX_STEP = 1024


def make_room(chat: Chat, turn: Turn, error: ContextFullError) -> bool:
    """Whether the user found a way; the turn is to be asked again then."""
    message = (
        f"The context is too small by {error.n_short:,} tokens: the conversation and this question"
        f" have {error.n_prompt:,}, an answer needs {error.n_answer:,} or more,"
        f" and it holds {error.n_ctx:,}."
    )
    n_drop = _n_to_drop(chat, turn, error)
    n_larger = larger_ctx(chat.model, error.n_prompt + error.n_answer)
    choices = [Choice("x", "drop this question")]
    if n_larger:
        choices.insert(0, Choice("l", f"take a larger context (--ctx {n_larger}), read all again"))
    if chat.conversation.turns and _fits(chat, turn, len(chat.conversation.turns), error):
        choices.insert(0, Choice("n", "start anew with this question alone"))
    if n_drop:
        turns = "the oldest turn" if n_drop == 1 else f"the {n_drop} oldest turns"
        choices.insert(0, Choice("d", f"drop {turns}"))
    chosen = chat.screen.choose(message, choices)
    if chosen == "d":
        chat.conversation = chat.conversation.without_oldest(n_drop)
    elif chosen == "n":
        chat.forget()
    elif chosen == "l" and n_larger:
        return enlarge(chat, n_larger)
    return chosen in ("d", "n")


def enlarge(chat: Chat, n_ctx: int) -> bool:
    """Opens the model again; whether that worked."""
    try:
        chat.reopen(None, n_ctx)
    except PopError as error:
        chat.fail(error)
        return False
    chat.screen.note(f"The context holds {chat.model.n_ctx():,} tokens now.")
    return True


def too_long(model: ChatModel, error: ContextFullError) -> PopError:
    """Where nobody can be asked: what is wrong, and a context that would do."""
    n_larger = larger_ctx(model, error.n_prompt + error.n_answer)
    larger = f"take a larger context (--ctx {n_larger}) or " if n_larger else ""
    return PopError(error.message, f"{larger}give less text")


def larger_ctx(model: ChatModel, n_needed: int) -> int | None:
    """A context for so many tokens and half as many again; None if the model knows no such one."""
    metadata = model.metadata
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length", "0")
    n_trained = int(trained) if trained.isdecimal() else 0
    wanted = -(-(n_needed + n_needed // 2) // _CTX_STEP) * _CTX_STEP
    n_ctx = min(wanted, n_trained)
    return n_ctx if n_ctx >= n_needed and n_ctx > model.n_ctx() else None


def _n_to_drop(chat: Chat, turn: Turn, error: ContextFullError) -> int:
    """How many of the oldest turns must go, at least one being kept; 0 when that is not enough."""
    n_turns = len(chat.conversation.turns)
    return next((n for n in range(1, n_turns) if _fits(chat, turn, n, error)), 0)


def _fits(chat: Chat, turn: Turn, n_dropped: int, error: ContextFullError) -> bool:
    shorter = chat.conversation.without_oldest(n_dropped).plus(turn)
    return chat.model.count_prompt(shorter.messages) + error.n_answer <= error.n_ctx
