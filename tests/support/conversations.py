"""Have conversations with a model."""

from pathlib import Path

from pop_local.engine.chat_messages import Message, TurnStats
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel


def opened(file: Path, **options) -> PopModel:
    return PopModel(EngineOptions.of(file, n_threads=1, **{"n_ctx": 1024} | options))


def ask(model: PopModel, *messages: Message, **options) -> tuple[str, TurnStats]:
    """Return the greedy answer to the last message (up to 12 tokens) and its statistics."""
    defaults = {"temperature": 0.0, "max_tokens": 12}
    *pieces, last = model.ask(messages, **defaults | options)
    assert all(piece.stats is None for piece in pieces)
    assert last.stats is not None
    return "".join(piece.text for piece in pieces) + last.text, last.stats
