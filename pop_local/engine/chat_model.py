"""A model that answers: conversations by its own template, or a text to be continued."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from converter.errors import PopError
from pop_local.engine.answer import Answering, answer
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.prompts import PLAIN_STOPS, PLAIN_TEMPLATE, THINK, Prompt
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.templates import LimitedChatFormatter
from pop_local.engine.turn import Message, TurnOptions


class ChatModel(PrunedLlama):
    """Conversations and measurements ask this; PopModel adds what people want around it."""

    @cached_property
    def recommended(self) -> dict[str, float]:
        """The fields of TurnOptions that the model's file recommends."""
        return recommended(self.metadata)

    @cached_property
    def _formatter(self) -> LimitedChatFormatter:
        eos, bos = (
            self._model.token_get_text(token) if token != -1 else ""
            for token in (self.token_eos(), self.token_bos())
        )
        template = self._template or PLAIN_TEMPLATE
        return LimitedChatFormatter(template=template, eos_token=eos, bos_token=bos)

    @property
    def _template(self) -> str:
        template: str = self.metadata.get("tokenizer.chat_template", "")
        return template

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
        """Make the prompt of a conversation, which ends where the answer begins.

        Raises PopError when the template refuses the conversation.
        """
        plain: Any = [asdict(message) for message in messages]
        try:
            text = self._formatter(messages=plain).prompt
        except (ValueError, TemplateError) as error:
            raise PopError(f"the chat template refuses this conversation: {error}") from error
        tokens = self.tokenize(text.encode(), add_bos=False, special=True)
        if self._model.add_bos_token() and tokens[:1] != [self.token_bos()]:
            tokens.insert(0, self.token_bos())
        begun = THINK if text.rstrip().endswith(THINK) else ""
        return Prompt(tokens, () if self._template else PLAIN_STOPS, begun)

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a conversation's prompt. Raises PopError as chat_prompt does."""
        return len(self.chat_prompt(messages).tokens)
