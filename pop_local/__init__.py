"""Prefill-only pruning for GGUF models on the user's own machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pop_local.base.errors import OutputExistsError, PopError, StoppedError
    from pop_local.calibration.options import FitOptions
    from pop_local.engine.context_full import ContextFullError
    from pop_local.engine.decode.grammar import Grammar, GrammarError
    from pop_local.engine.model import PopModel
    from pop_local.engine.sessions.chat_session import Answer, ChatSession, Stream
    from pop_local.engine.sessions.conversation import Conversation, Document, Turn
    from pop_local.engine.turn import AnswerOptions, SessionStats, TurnStats
    from pop_local.measure.budget import BALANCED, FAST, NEAR_LOSSLESS
    from pop_local.measure.quality import QualitySettings
    from pop_local.research.analyze import Analysis, analyze
    from pop_local.research.options import AnalyzeOptions
    from pop_local.texts.documents import read_document
    from pop_local.workflows.conversion.convert import Converted, convert
    from pop_local.workflows.conversion.goals import Boundary, Fastest, Skip, Within
    from pop_local.workflows.conversion.refusals import (
        CopyingBrokenError,
        OverBudgetError,
        RecallLostError,
    )
    from pop_local.workflows.evaluate import EvaluateOptions, Evaluation, evaluate
    from pop_local.workflows.events import Watch
    from pop_local.workflows.learning import Lessons
    from pop_local.workflows.options import Hardware, RowOptions

__version__ = "0.1.0"

__all__ = [
    "BALANCED",
    "FAST",
    "NEAR_LOSSLESS",
    "Analysis",
    "AnalyzeOptions",
    "Answer",
    "AnswerOptions",
    "Boundary",
    "ChatSession",
    "ContextFullError",
    "Conversation",
    "Converted",
    "CopyingBrokenError",
    "Document",
    "EvaluateOptions",
    "Evaluation",
    "Fastest",
    "FitOptions",
    "Grammar",
    "GrammarError",
    "Hardware",
    "Lessons",
    "OutputExistsError",
    "OverBudgetError",
    "PopError",
    "PopModel",
    "QualitySettings",
    "RecallLostError",
    "RowOptions",
    "SessionStats",
    "Skip",
    "StoppedError",
    "Stream",
    "Turn",
    "TurnStats",
    "Watch",
    "Within",
    "__version__",
    "analyze",
    "convert",
    "evaluate",
    "read_document",
]

# Imported when they are asked for: the commands' --help must not load llama.cpp.
_MODULES = {
    "pop_local.base.errors": ["OutputExistsError", "PopError", "StoppedError"],
    "pop_local.calibration.options": ["FitOptions"],
    "pop_local.measure.budget": ["BALANCED", "FAST", "NEAR_LOSSLESS"],
    "pop_local.measure.quality": ["QualitySettings"],
    "pop_local.research.analyze": ["Analysis", "analyze"],
    "pop_local.research.options": ["AnalyzeOptions"],
    "pop_local.workflows.conversion.convert": ["Converted", "convert"],
    "pop_local.workflows.conversion.goals": ["Boundary", "Fastest", "Skip", "Within"],
    "pop_local.workflows.conversion.refusals": [
        *("CopyingBrokenError", "OverBudgetError", "RecallLostError"),
    ],
    "pop_local.workflows.evaluate": ["EvaluateOptions", "Evaluation", "evaluate"],
    "pop_local.workflows.events": ["Watch"],
    "pop_local.workflows.learning": ["Lessons"],
    "pop_local.workflows.options": ["Hardware", "RowOptions"],
    "pop_local.engine.decode.grammar": ["Grammar", "GrammarError"],
    "pop_local.engine.model": ["PopModel"],
    "pop_local.texts.documents": ["read_document"],
    "pop_local.engine.sessions.conversation": ["Conversation", "Document", "Turn"],
    "pop_local.engine.sessions.chat_session": ["Answer", "ChatSession", "Stream"],
    "pop_local.engine.context_full": ["ContextFullError"],
    "pop_local.engine.turn": ["AnswerOptions", "SessionStats", "TurnStats"],
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
