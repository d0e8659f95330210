"""From a conversation to its prompt, by the template of the model's file."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from pop_converter.base.errors import PopError
from pop_local.engine.chat_messages import Message
from pop_local.engine.images.mmproj import ImageChunk, Mmproj, Seen
from pop_local.engine.images.pictures import Picture, has_pillow
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context, utf8
from pop_local.engine.prompt.prompt import PLAIN_STOPS, PLAIN_TEMPLATE, THINK, Prompt
from pop_local.engine.prompt.special_tokens import SpecialTokens, unused_marks
from pop_local.engine.prompt.templates import Template

_PROBE = "0f3c9a71d2"  # in no template

# From the messages' contents, and what marks other texts, to the text of a prompt.
Write = Callable[[list[str], Callable[[str], str]], str]


class Prompter:
    """Makes prompts for one model.

    `parse_special`: whether special tokens that messages and documents spell out act as such. Then
    whoever wrote a document can write turns of the conversation, too.
    """

    def __init__(
        self, context: Context, vision: Mmproj | None = None, *, parse_special: bool = False
    ) -> None:
        self.parse_special = parse_special
        self.context, self._vision = context, vision

    @property
    def has_template(self) -> bool:
        """Whether the model's file has one; base models have none."""
        return bool(self._source)

    @property
    def _source(self) -> str:
        return str(self.context.header.get("tokenizer.chat_template") or "")

    @cached_property
    def template(self) -> Template:
        """The model's own, or a plain one. Raises PopError for one that is broken."""
        return Template(self._source or PLAIN_TEMPLATE, self.context.vocab)

    def require_template(self) -> None:
        """Validate the chat template, if the file has one. Raises PopError."""
        if self.has_template:
            try:
                _ = self.template
            except PopError as error:
                message = f"{self.context.path} cannot be opened: {error.message}"
                raise PopError(message, error.hint) from error

    @property
    def can_see(self) -> bool:
        """Whether pictures can be read, which takes an mmproj and Pillow."""
        return self._vision is not None and has_pillow()

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.context)

    def text(self, text: str) -> Prompt:
        """Return the prompt of a text that is to be continued. Raises PopError."""
        return Prompt(self.context.tokenize(text, add_bos=True))

    def conversation(self, messages: Sequence[Message]) -> Prompt:
        """Return the prompt of a conversation, which ends where the answer begins.

        Raises PopError when the template refuses the conversation.
        """
        if any(message.role == "system" for message in messages) and not self._takes_system:
            messages = _without_system(messages)
        return self.written(messages, (), lambda contents, _: self._rendered(messages, contents))

    def written(self, messages: Sequence[Message], others: Sequence[str], write: Write) -> Prompt:
        """Return the prompt that `write` makes of the messages' contents and these other texts.

        It is called again, with marks in the place of special tokens that a text spells out: those
        of the contents are there, the second argument puts them into other texts.
        """
        texts = [*(message.content for message in messages), *others]
        utf8("".join(texts))
        marks: dict[str, str] = {}
        unused = iter(unused_marks(texts))
        pictures: dict[str, Picture] = {}
        contents = [_with_marks(message, unused, pictures) for message in messages]

        def marked(text: str) -> str:
            for mark, one in marks.items():
                text = text.replace(one, mark)
            return text

        while True:
            text = write([marked(content) for content in contents], marked)
            tokens = self.context.tokenize(text, special=True)
            left = [marked(one) for one in texts]
            spelled = [] if self.parse_special else self._special.spelled(tokens, left)
            if not spelled:
                break
            marks |= {next(unused): one for one in spelled}
        if marks and not pictures:
            tokens = self._special.tokens(text, marks)
        bos = list(self.context.bos)
        images: dict[int, ImageChunk] = {}
        if pictures:
            shown = {mark: self.see(picture) for mark, picture in pictures.items()}
            tokens, images = self._with_pictures(text, marks, shown)
        if bos and tokens[:1] != bos:
            tokens = bos + tokens
            images = {start + 1: image for start, image in images.items()}
        begun = THINK if text.rstrip().endswith(THINK) else ""
        return Prompt(tokens, () if self.has_template else PLAIN_STOPS, begun, images)

    def before_question(self) -> str:
        """Return what the model's template puts before a user's first question.

        It is "" without one, and where that wants something else than a question. Raises PopError
        where it goes beyond its limits.
        """
        if not self.has_template:
            return ""
        try:
            shown = self.template.render([{"role": "user", "content": _PROBE}])
        except ValueError:
            return ""
        before, found, _ = shown.partition(_PROBE)
        return before if found else ""

    def see(self, picture: Picture) -> Seen:
        """Cut a picture up as the model wants it. Raises PopError as Mmproj.see does."""
        return self.open_vision().see(picture)

    def count_picture(self, picture: Picture) -> int:
        """Return the number of tokens of a picture. Raises PopError as Mmproj.see does."""
        return len(self.see(picture).tokens)

    def open_vision(self) -> Mmproj:
        """Load the mmproj, unless it is. Raises PopError without one, and as Mmproj.open does."""
        if self._vision is None:
            raise PopError(
                "a picture is given, but the model is open without its mmproj",
                "open it with the mmproj that was published with it",
                cause="no-mmproj",
            )
        return self._vision.open(self.context.model, self.context.settings.n_threads_batch)

    def _with_pictures(
        self, text: str, marks: Mapping[str, str], shown: Mapping[str, Seen]
    ) -> tuple[list[int], dict[int, ImageChunk]]:
        """The tokens and images of a rendered prompt in which a mark stands for each picture."""
        pieces = re.split(f"([{''.join(shown)}])", text)
        if pieces[1::2] != list(shown):
            raise PopError("the chat template leaves out pictures", "ask about fewer at a time")
        tokens: list[int] = []
        images: dict[int, ImageChunk] = {}
        for piece in pieces:
            if piece in shown:
                found = shown[piece].images
                images |= {len(tokens) + offset: image for offset, image in found.items()}
                tokens += shown[piece].tokens
            elif piece and marks:
                tokens += self._special.tokens(piece, dict(marks))
            elif piece:
                tokens += self.context.tokenize(piece, special=True)
        return tokens, images

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template takes a message's content as parts only, found by trying it."""
        # One that goes beyond its limits with plain text would do so with the conversation, too.
        with suppress(ValueError):
            if self._is_shown({"role": "user", "content": _PROBE}):
                return False
        with suppress(PopError, ValueError):
            parts = [{"type": "text", "text": _PROBE}]
            return self._is_shown({"role": "user", "content": parts})
        return False

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows what the system says, found by trying it."""
        with suppress(ValueError):
            return self._is_shown(self._given("system", _PROBE), self._given("user", "a"))
        return False

    def _is_shown(self, *messages: Any) -> bool:
        return _PROBE in self.template.render(messages)

    def _given(self, role: str, content: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": content}]
        return {"role": role, "content": parts if self._wants_parts else content}

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        said = zip(messages, contents, strict=True)
        try:
            return self.template.render(
                [self._given(message.role, content) for message, content in said]
            )
        except ValueError as error:
            raise PopError(f"the chat template refuses this conversation: {error}") from error


def is_end(context: Context, token: int) -> bool:
    """Whether a token ends an answer."""
    return bool(bindings().llama_vocab_is_eog(context.vocab, token))


def _with_marks(message: Message, unused: Iterator[str], pictures: dict[str, Picture]) -> str:
    """The content of a message with a mark for each picture, which is added to `pictures`."""
    pieces, at = [], 0
    for offset, picture in message.pictures:
        pictures[mark := next(unused)] = picture
        pieces += [message.content[at:offset], mark]
        at = offset
    return "".join([*pieces, message.content[at:]])


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Let the system's words begin the user's next ones (llama.cpp's common/chat.cpp)."""
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
