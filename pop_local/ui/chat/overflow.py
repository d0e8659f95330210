"""Make room for prompts that do not fit in the context."""

from pop_base.errors import PopError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.engine import Engine
from pop_local.engine.sessions.chat_session import ChatSession
from pop_local.ui.chat.screen import Screen

ANSWER_TOKENS = 128
_CTX_STEP = 1024


def answer_reserve(max_tokens: int | None, n_ctx: int) -> int:
    """Return the number of context tokens to reserve for an answer."""
    return min(max_tokens or ANSWER_TOKENS, ANSWER_TOKENS, max(1, n_ctx // 8))


def ask_for_room(screen: Screen, session: ChatSession, error: ContextFullError) -> tuple[int, int]:
    """Ask the user how to make room for the prompt.

    Return the number of turns to drop and the new context length (0: keep the current context).
    """
    message = (
        f"The context is {error.n_short:,} tokens too small: the prompt has {error.n_prompt:,}"
        f" tokens, an answer needs {error.n_answer:,} or more, and the context has {error.n_ctx:,}."
    )
    n_turns = len(session.conversation.turns)
    n_drop = next((n for n in range(1, n_turns) if _fits(session, n, error)), 0)
    n_larger = larger_ctx(session.engine, error.n_prompt + error.n_answer) or 0
    choices = {}
    if n_drop:
        choices["d"] = "drop the oldest turn" if n_drop == 1 else f"drop the {n_drop} oldest turns"
    if n_turns and _fits(session, n_turns, error):
        choices["n"] = "start a new conversation with this question"
    if n_larger:
        choices["l"] = f"use a larger context (--ctx {n_larger})"
    choices["x"] = "drop this question"
    choice = screen.choose(message, choices)
    n_dropped = {"d": n_drop, "n": n_turns}.get(choice or "", 0)
    return n_dropped, n_larger if choice == "l" else 0


def too_long(engine: Engine, error: ContextFullError) -> PopError:
    """Return a PopError whose hint suggests a large enough context."""
    if n_larger := larger_ctx(engine, error.n_prompt + error.n_answer):
        hint = f"use a larger context (--ctx {n_larger}) or shorten the prompt"
    else:
        hint = engine.context.files.untrained_hint
    return PopError(error.message, hint)


def larger_ctx(engine: Engine, n_needed: int) -> int | None:
    """Return a context length for `n_needed` tokens, or None if the context cannot be enlarged."""
    n_wanted = -(-(n_needed + n_needed // 2) // _CTX_STEP) * _CTX_STEP
    n_ctx = min(n_wanted, engine.context.files.n_ctx_train or n_wanted)
    return n_ctx if n_ctx >= n_needed and n_ctx > engine.context.n_ctx else None


def _fits(session: ChatSession, n_dropped: int, error: ContextFullError) -> bool:
    shorter = session.conversation.without_oldest(n_dropped)
    dropped = [] if session.dropped is None else session.dropped.messages
    n_prompt = len(session.engine.prompter.conversation([*shorter.messages, *dropped]))
    return n_prompt + error.n_answer <= error.n_ctx
