"""Context lengths for prompts that do not fit in the context."""

from pop_base.errors import PopError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.engine import Engine

ANSWER_TOKENS = 128
_CTX_STEP = 1024


def answer_reserve(max_tokens: int | None, n_ctx: int) -> int:
    """Return the number of context tokens to reserve for an answer."""
    return min(max_tokens or ANSWER_TOKENS, ANSWER_TOKENS, max(1, n_ctx // 8))


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
