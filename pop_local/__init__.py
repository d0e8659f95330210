"""Prefill-only pruning for GGUF models on the user's own machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pop_converter.base.errors import OutputExistsError as OutputExistsError
    from pop_converter.base.errors import PopError as PopError
    from pop_converter.base.errors import StoppedError as StoppedError
    from pop_local.calibration.fit_options import FitOptions as FitOptions
    from pop_local.engine.cache.prompt_cache import PromptCache as PromptCache
    from pop_local.engine.chat_messages import SessionStats as SessionStats
    from pop_local.engine.chat_messages import TurnStats as TurnStats
    from pop_local.engine.context_full import ContextFullError as ContextFullError
    from pop_local.engine.decode.grammar import Grammar as Grammar
    from pop_local.engine.decode.grammar import GrammarError as GrammarError
    from pop_local.engine.engine_options import EngineOptions as EngineOptions
    from pop_local.engine.model import PopModel as PopModel
    from pop_local.engine.sessions.chat_session import Answer as Answer
    from pop_local.engine.sessions.chat_session import ChatSession as ChatSession
    from pop_local.engine.sessions.chat_session import Stream as Stream
    from pop_local.engine.sessions.conversation import Conversation as Conversation
    from pop_local.engine.sessions.conversation import Turn as Turn
    from pop_local.engine.turn_options import AnswerOptions as AnswerOptions
    from pop_local.measure.budget import BALANCED as BALANCED
    from pop_local.measure.budget import FAST as FAST
    from pop_local.measure.budget import NEAR_LOSSLESS as NEAR_LOSSLESS
    from pop_local.measure.quality import QualitySettings as QualitySettings
    from pop_local.research.analyze_options import AnalyzeOptions as AnalyzeOptions
    from pop_local.research.layer_analysis import Analysis as Analysis
    from pop_local.research.layer_analysis import analyze as analyze
    from pop_local.texts.document import Document as Document
    from pop_local.texts.document_readers import read_document as read_document
    from pop_local.workflows.conversion.convert_model import Converted as Converted
    from pop_local.workflows.conversion.convert_model import convert as convert
    from pop_local.workflows.conversion.goals import Boundary as Boundary
    from pop_local.workflows.conversion.goals import Skip as Skip
    from pop_local.workflows.conversion.goals import Within as Within
    from pop_local.workflows.conversion.refusals import CopyingBrokenError as CopyingBrokenError
    from pop_local.workflows.conversion.refusals import OverBudgetError as OverBudgetError
    from pop_local.workflows.conversion.row_options import RowOptions as RowOptions
    from pop_local.workflows.evaluate import EvaluateOptions as EvaluateOptions
    from pop_local.workflows.evaluate import Evaluation as Evaluation
    from pop_local.workflows.evaluate import evaluate as evaluate
    from pop_local.workflows.events import Watch as Watch
    from pop_local.workflows.hardware import Hardware as Hardware
    from pop_local.workflows.learning import OnlineCalibration as OnlineCalibration

__version__ = "0.1.0"

# Imported on first access: the commands' --help must not load llama.cpp.
_MODULES = {
    "pop_converter.base.errors": ["OutputExistsError", "PopError", "StoppedError"],
    "pop_local.calibration.fit_options": ["FitOptions"],
    "pop_local.measure.budget": ["BALANCED", "FAST", "NEAR_LOSSLESS"],
    "pop_local.measure.quality": ["QualitySettings"],
    "pop_local.research.layer_analysis": ["Analysis", "analyze"],
    "pop_local.research.analyze_options": ["AnalyzeOptions"],
    "pop_local.workflows.conversion.convert_model": ["Converted", "convert"],
    "pop_local.workflows.conversion.goals": ["Boundary", "Skip", "Within"],
    "pop_local.workflows.conversion.refusals": [
        *("CopyingBrokenError", "OverBudgetError"),
    ],
    "pop_local.workflows.evaluate": ["EvaluateOptions", "Evaluation", "evaluate"],
    "pop_local.workflows.events": ["Watch"],
    "pop_local.workflows.learning": ["OnlineCalibration"],
    "pop_local.workflows.hardware": ["Hardware"],
    "pop_local.workflows.conversion.row_options": ["RowOptions"],
    "pop_local.engine.decode.grammar": ["Grammar", "GrammarError"],
    "pop_local.engine.cache.prompt_cache": ["PromptCache"],
    "pop_local.engine.engine_options": ["EngineOptions"],
    "pop_local.engine.model": ["PopModel"],
    "pop_local.texts.document_readers": ["read_document"],
    "pop_local.engine.sessions.conversation": ["Conversation", "Turn"],
    "pop_local.texts.document": ["Document"],
    "pop_local.engine.sessions.chat_session": ["Answer", "ChatSession", "Stream"],
    "pop_local.engine.context_full": ["ContextFullError"],
    "pop_local.engine.chat_messages": ["SessionStats", "TurnStats"],
    "pop_local.engine.turn_options": ["AnswerOptions"],
}

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name
    _WHERE = {name: module for module, names in _MODULES.items() for name in names}
    __all__ = ["__version__", *_WHERE]

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_WHERE[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_WHERE})
