"""Plain completion: the text itself is the prompt, whatever template the model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .chat import Prompt, Prompts, TurnOptions, answer
from .turn import Chunk, Message

if TYPE_CHECKING:
    from .model import PopModel


def continue_text(model: PopModel, text: str, **options: Any) -> Iterator[Chunk]:
    """Continue the text; otherwise as PopModel.chat_turn."""
    prompts = _PlainPrompts(model)
    return answer(model, prompts, [Message("user", text)], TurnOptions(**options))


class _PlainPrompts(Prompts):
    def __init__(self, model: PopModel) -> None:
        super().__init__(model)
        self._model = model

    def render(self, messages: Sequence[Message]) -> Prompt:
        text = messages[-1].content.encode()
        return Prompt(self._model.tokenize(text, add_bos=True, special=False), ())
