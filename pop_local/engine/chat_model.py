"""A model that answers: conversations by its own template, or a text to be continued."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pop_local.engine.answer import Answering, answer
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.prompts import Prompt, Prompts
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.turn import Message, TurnOptions


class ChatModel(PrunedLlama):
    """Conversations and measurements ask this; PopModel adds what people want around it."""

    @cached_property
    def recommended(self) -> dict[str, float]:
        """The fields of TurnOptions that the model's file recommends."""
        return recommended(self.metadata)

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self)

    def chat_turn(self, messages: Sequence[Message], **options: Any) -> Answering:
        """Answer the last message; `options` are the fields of TurnOptions, by default as the
        file recommends.

        The last chunk carries the figures. Closing the iterator, or an exception in it, leaves the
        model usable. Raises PopError when the prompt does not fit the context or the template
        refuses the conversation.
        """
        return answer(self, lambda: self.chat_prompt(messages), self._chosen(options))

    def continue_text(self, text: str, **options: Any) -> Answering:
        """Continue the text, which is the whole prompt; otherwise as chat_turn."""

        def render() -> Prompt:
            return Prompt(self.tokenize(text.encode(), add_bos=True, special=False))

        return answer(self, render, self._chosen(options))

    def _chosen(self, options: dict[str, Any]) -> TurnOptions:
        chosen: dict[str, Any] = self.recommended | options
        return TurnOptions(**chosen)

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Turn a conversation into tokens. Raises PopError when the template refuses it."""
        return self._prompts.render(messages)

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a conversation's prompt. Raises PopError as chat_prompt does."""
        return len(self.chat_prompt(messages).tokens)
