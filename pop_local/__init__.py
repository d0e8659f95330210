"""Prefill-only pruning for GGUF models on the user's own machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.errors import PopError
    from pop_local.engine.model import PopModel
    from pop_local.engine.sessions.chat_session import Answer, ChatSession, Stream
    from pop_local.engine.sessions.conversation import Conversation, Document, Turn
    from pop_local.engine.turn import AnswerOptions, ContextFullError, SessionStats, TurnStats
    from pop_local.texts.documents import read_document

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerOptions",
    "ChatSession",
    "ContextFullError",
    "Conversation",
    "Document",
    "PopError",
    "PopModel",
    "SessionStats",
    "Stream",
    "Turn",
    "TurnStats",
    "__version__",
    "read_document",
]

# Imported when they are asked for: the commands' --help must not load llama.cpp.
_MODULES = {
    "converter.errors": ["PopError"],
    "pop_local.engine.model": ["PopModel"],
    "pop_local.texts.documents": ["read_document"],
    "pop_local.engine.sessions.conversation": ["Conversation", "Document", "Turn"],
    "pop_local.engine.sessions.chat_session": ["Answer", "ChatSession", "Stream"],
    "pop_local.engine.turn": ["AnswerOptions", "ContextFullError", "SessionStats", "TurnStats"],
}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(module), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
