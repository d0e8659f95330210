"""Have conversations with a model."""

from pathlib import Path

from pop_local.engine.chat_messages import Message, TurnStats
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.texts.document_readers import Document

QUESTION = Turn("a b c d e f g h " * 20, (Document("notes.txt", "i j k " * 20),))


def opened(file: Path, **options) -> PopModel:
    return PopModel(EngineOptions.of(file, n_threads=1, **{"n_ctx": 1024} | options))


def answered(model: PopModel, *turns: Turn) -> Conversation:
    """Return the conversation with the model's answer to its last question."""
    said = Conversation("Be brief.", turns)
    chunks = model.ask(said.messages, temperature=0.0, max_tokens=8)
    answer = "".join(chunk.text for chunk in chunks)
    return said.without_last().plus(Turn(turns[-1].question, turns[-1].documents, answer))


def ask(model: PopModel, *messages: Message, **options) -> tuple[str, TurnStats]:
    """Return the greedy answer to the last message (up to 12 tokens) and its statistics."""
    defaults = {"temperature": 0.0, "max_tokens": 12}
    *pieces, last = model.ask(messages, **defaults | options)
    assert all(piece.stats is None for piece in pieces)
    assert last.stats is not None
    return "".join(piece.text for piece in pieces) + last.text, last.stats
