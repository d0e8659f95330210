"""Plain completion: the text itself is the prompt, whatever template the model has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pop_local.engine.answer import Answering, Prompt, answer
from pop_local.engine.turn import TurnOptions

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


def continue_text(model: PopModel, text: str, **options: Any) -> Answering:
    """Continue the text; otherwise as PopModel.chat_turn."""

    def render() -> Prompt:
        return Prompt(model.tokenize(text.encode(), add_bos=True, special=False), ())

    chosen: dict[str, Any] = model.recommended | options
    return answer(model, render, TurnOptions(**chosen))
