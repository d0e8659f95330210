"""A model that answers: conversations by its own template, or a text to be continued."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from pop_local.base.errors import PopError
from pop_local.engine.answer import Answering, answer
from pop_local.engine.decode.grammar import GrammarError
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.images.mmproj import Seen
from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama.upstream import LlamaGrammar
from pop_local.engine.prompts import PLAIN_STOPS, PLAIN_TEMPLATE, THINK, Prompt
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.special_tokens import SpecialTokens, unused_marks
from pop_local.engine.templates import LimitedChatFormatter, formatter_of
from pop_local.engine.turn import Message, TurnOptions

_PROBE = "0f3c9a71d2"  # in no template


class ChatModel(PrunedLlama):
    """Conversations and measurements ask this; PopModel adds what people want around it.

    `parse_special`: whether special tokens that messages and documents spell out act as such. Then
    whoever wrote a document can write turns of the conversation, too.
    """

    parse_special = False

    @cached_property
    def recommended(self) -> dict[str, float]:
        """The fields of TurnOptions that the model's file recommends."""
        return recommended(self.metadata)

    @property
    def n_ctx_train(self) -> int:
        """The context in tokens that the model was trained with."""
        return int(self._model.n_ctx_train())

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.vocab, self.tokens_of)

    @cached_property
    def _formatter(self) -> LimitedChatFormatter:
        return formatter_of(self.vocab, self._template or PLAIN_TEMPLATE)

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

    def ask(self, messages: Sequence[Message], **options: Any) -> Answering:
        """As chat_turn; a base model, which has no chat template, continues what they say.

        Pictures make it a conversation even then.
        """
        if self._template or any(message.pictures for message in messages):
            return self.chat_turn(messages, **options)
        return self.continue_text("\n\n".join(each.content for each in messages), **options)

    def continue_text(self, text: str, **options: Any) -> Answering:
        """Continue the text, which is the whole prompt; otherwise as chat_turn."""

        def render() -> Prompt:
            return Prompt(self.tokens_of(text, add_bos=True))

        return answer(self, render, self._chosen(options))

    def create_chat_completion(self, *arguments: Any, **options: Any) -> Any:
        """As llama_cpp's, with this library's grammars of JSON schemas, as the server's.

        Raises GrammarError for a response_format that an answer cannot be kept to, and PopError for
        pictures, which llama_cpp's templates would drop or invent.
        """
        messages = options.get("messages") or (arguments[0] if arguments else [])
        if any(_has_pictures(message.get("content")) for message in messages):
            raise PopError(
                "llama_cpp's own chat shows the model no pictures",
                "ask with chat(..., images=[...])",
            )
        schema = _schema_of(options.get("response_format") or {})
        if schema is not None:
            # llama_cpp's own let raw line ends into strings, and take no json_schema.
            options["response_format"] = None
            options["grammar"] = LlamaGrammar(_grammar=self.grammars.of_schema(schema))
        return super().create_chat_completion(*arguments, **options)

    def _chosen(self, options: dict[str, Any]) -> TurnOptions:
        chosen: dict[str, Any] = self.recommended | options
        return TurnOptions(**chosen)

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Make the prompt of a conversation, which ends where the answer begins.

        Raises PopError when the template refuses the conversation.
        """
        if any(message.role == "system" for message in messages) and not self._takes_system:
            messages = _without_system(messages)
        contents = [message.content for message in messages]
        _encoded("".join(contents))
        marks: dict[str, str] = {}
        unused = iter(unused_marks(contents))
        pictures: dict[str, Picture] = {}
        contents = [_with_marks(message, unused, pictures) for message in messages]
        while True:
            text = self._rendered(messages, contents)
            tokens = self.tokens_of(text, special=True)
            spelled = [] if self.parse_special else self._special.spelled(tokens, contents)
            if not spelled:
                break
            for one in spelled:
                marks[mark := next(unused)] = one
                contents = [content.replace(one, mark) for content in contents]
        seen = tuple(self.eye.see(picture) for picture in pictures.values()) if pictures else ()
        if seen:
            shown = dict(zip(pictures, seen, strict=True))
            tokens = self._with_pictures(text, marks, shown)
        elif marks:
            tokens = self._special.tokens(text, marks)
        if self._model.add_bos_token() and tokens[:1] != [self.token_bos()]:
            tokens.insert(0, self.token_bos())
        begun = THINK if text.rstrip().endswith(THINK) else ""
        return Prompt(tokens, () if self._template else PLAIN_STOPS, begun, seen)

    def _with_pictures(self, text: str, marks: dict[str, str], shown: dict[str, Seen]) -> list[int]:
        """The tokens of a rendered prompt in which a mark stands for each picture."""
        pieces = re.split(f"([{''.join(shown)}])", text)
        if pieces[1::2] != list(shown):
            raise PopError("the chat template leaves out pictures", "ask about fewer at a time")
        tokens: list[int] = []
        for piece in pieces:
            if piece in shown:
                tokens += shown[piece].tokens
            elif piece and marks:
                tokens += self._special.tokens(piece, marks)
            elif piece:
                tokens += self.tokens_of(piece, special=True)
        return tokens

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template takes a message's content as parts only, found by trying it."""
        # One that goes beyond its limits with plain text would do so with the conversation, too.
        with suppress(ValueError, TemplateError):
            if self._is_shown({"role": "user", "content": _PROBE}):
                return False
        with suppress(PopError, ValueError, TemplateError):
            parts = [{"type": "text", "text": _PROBE}]
            return self._is_shown({"role": "user", "content": parts})
        return False

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows what the system says, found by trying it."""
        with suppress(ValueError, TemplateError):
            return self._is_shown(self._given("system", _PROBE), self._given("user", "a"))
        return False

    def _is_shown(self, *messages: Any) -> bool:
        return _PROBE in self._formatter(messages=[*messages]).prompt

    def _given(self, role: str, content: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": content}]
        return {"role": role, "content": parts if self._wants_parts else content}

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        said = zip(messages, contents, strict=True)
        plain: Any = [self._given(message.role, content) for message, content in said]
        try:
            return str(self._formatter(messages=plain).prompt)
        except (ValueError, TemplateError) as error:
            raise PopError(f"the chat template refuses this conversation: {error}") from error

    def tokens_of(self, text: str, special: bool = False, *, add_bos: bool = False) -> list[int]:
        """Return the tokens of a text; what looks like a special token is text unless `special`.

        Raises PopError for what cannot be written as UTF-8.
        """
        return self.tokenize(_encoded(text), add_bos=add_bos, special=special)

    def count_picture(self, picture: Picture) -> int:
        """Count the tokens that a picture takes. Raises PopError as Mmproj.see does."""
        return len(self.eye.see(picture).tokens)

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a conversation's prompt. Raises PopError as chat_prompt does."""
        return len(self.chat_prompt(messages).tokens)


def _has_pictures(content: Any) -> bool:
    return isinstance(content, list) and any(part.get("type") != "text" for part in content)


def _with_marks(message: Message, unused: Iterator[str], pictures: dict[str, Picture]) -> str:
    """The content of a message with a mark for each picture, which is added to `pictures`."""
    pieces, at = [], 0
    for offset, picture in message.pictures:
        pictures[mark := next(unused)] = picture
        pieces += [message.content[at:offset], mark]
        at = offset
    return "".join([*pieces, message.content[at:]])


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """What the system says begins what the user says next (llama.cpp's common/chat.cpp)."""
    found: list[Message] = []
    held: Message | None = None
    for message in messages:
        if held is not None and message.role != "assistant":
            message, held = _joined(held, message), None
        if message.role == "system":
            held = message
        else:
            found.append(message)
    return found if held is None else [*found, replace(held, role="user")]


def _joined(first: Message, second: Message) -> Message:
    content = f"{first.content}\n{second.content}"
    n_before = len(content) - len(second.content)
    moved = ((n_before + offset, picture) for offset, picture in second.pictures)
    return Message(second.role, content, (*first.pictures, *moved))


def _schema_of(form: dict[str, Any]) -> Any:
    """The JSON schema that a response_format asks for, None for any text."""
    match form.get("type", "text"), form:
        case "text", _:
            return None
        case "json_object", _:
            return form.get("schema") or {"type": "object"}
        case "json_schema", {"json_schema": {"schema": schema}}:
            return schema
    raise GrammarError(f"there is no response_format like {form}")


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PopError("the prompt is not UTF-8 text", "save or type it as UTF-8") from error
