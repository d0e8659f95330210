"""Build prompts from conversations, using the chat template in the model's file."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.chat_messages import Message
from pop_local.engine.images.mmproj import ImageChunk, Mmproj, TokenizedPicture
from pop_local.engine.images.pictures import Picture, has_pillow
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.vocabulary import utf8
from pop_local.engine.prompt.prompt import PLAIN_STOPS, PLAIN_TEMPLATE, THINK, Prompt
from pop_local.engine.prompt.special_tokens import SpecialTokens, unused_marks
from pop_local.engine.prompt.templates import Template

_PROBE = "0f3c9a71d2"  # in no template

# Renders a prompt's text from the messages' contents and a function that marks the other texts.
Write = Callable[[list[str], Callable[[str], str]], str]


class Prompter:
    """A prompt builder for a model.

    `parse_special`: whether to parse special tokens in messages and documents. If True, a document
    can forge conversation turns.
    """

    def __init__(
        self, context: Context, vision: Mmproj | None = None, *, parse_special: bool = False
    ) -> None:
        self.parse_special = parse_special
        self.context, self._vision = context, vision
        self._special = SpecialTokens(context)
        self._source = str(context.files.header.get("tokenizer.chat_template") or "")

    @property
    def has_template(self) -> bool:
        """Return whether the model's file has a chat template. Base models have no template."""
        return bool(self._source)

    @cached_property
    def template(self) -> Template:
        """The model's template, or a plain template. Raises PopError if the template is broken."""
        try:
            return Template(self._source or PLAIN_TEMPLATE, self.context.vocabulary.pointer)
        except PopError as error:
            message = f"{self.context.files.path} cannot be opened: {error.message}"
            raise PopError(message, error.hint) from error

    @property
    def can_see(self) -> bool:
        """Return whether the model can read images, which requires an mmproj and Pillow."""
        return self._vision is not None and has_pillow()

    def text(self, text: str) -> Prompt:
        """Return a prompt for completing `text`. Raises the same errors as Vocabulary.tokenize."""
        return Prompt(self.context.vocabulary.tokenize(text, add_bos=True))

    def conversation(self, messages: Sequence[Message], *, continues: bool = False) -> Prompt:
        """Return a conversation's prompt, up to the start of the answer.

        `continues`: whether the answer continues the last message. Raises PopError if the template
        rejects the conversation.
        """
        before, begun = (messages[:-1], messages[-1:]) if continues else (messages, ())
        if any(message.role == "system" for message in before) and not self._supports_system:
            before = _without_system(before)
        n = len(before)

        def write(contents: list[str], _: Callable[[str], str]) -> str:
            return "".join([self._rendered(before, contents[:n]), *contents[n:]])

        return self.render([*before, *begun], (), write)

    def render(self, messages: Sequence[Message], others: Sequence[str], write: Write) -> Prompt:
        """Return the prompt that `write` renders.

        If any string contains special tokens, `write` is called again with placeholders for these
        tokens. `write` receives two arguments: the contents with placeholders, and a function that
        adds placeholders to other strings. Raises PopError if `write` raises ValueError.
        """
        texts = [*(message.content for message in messages), *others]
        utf8("".join(texts))
        marks: dict[str, str] = {}
        unused = iter(unused_marks(texts))
        pictures: dict[str, Picture] = {}
        contents = [_with_marks(message, unused, pictures) for message in messages]

        def marked(text: str) -> str:
            for mark, spelling in marks.items():
                text = text.replace(spelling, mark)
            return text

        while True:
            try:
                text = write([marked(content) for content in contents], marked)
            except ValueError as error:
                message = f"the chat template rejects this conversation: {error}"
                raise PopError(message) from error
            tokens = self.context.vocabulary.tokenize(text, special=True)
            left = [marked(each) for each in texts]
            spelled = [] if self.parse_special else self._special.spelled(tokens, left)
            if not spelled:
                break
            marks |= {next(unused): each for each in spelled}
        bos = list(self.context.vocabulary.bos)
        images: dict[int, ImageChunk] = {}
        if marks or pictures:
            shown = {mark: self.open_vision().see(each) for mark, each in pictures.items()}
            tokens, images = self._with_pictures(text, marks, shown)
        if bos and tokens[:1] != bos:
            tokens = bos + tokens
            images = {start + 1: image for start, image in images.items()}
        begun = THINK if text.rstrip().endswith(THINK) else ""
        return Prompt(tokens, () if self.has_template else PLAIN_STOPS, begun, images)

    def before_question(self) -> str:
        """Return the text that the template renders before the first user message.

        Returns "" if the model has no template, or if its template rejects a conversation with one
        question. Raises PopError if the template exceeds the limits.
        """
        if self.has_template:
            with suppress(ValueError):
                text = self.template.render([{"role": "user", "content": _PROBE}])
                before, probe, _ = text.partition(_PROBE)
                return before if probe else ""
        return ""

    def count_picture(self, picture: Picture) -> int:
        """Return the image's length in tokens. Raises the same errors as Mmproj.see."""
        return len(self.open_vision().see(picture).tokens)

    def open_vision(self) -> Mmproj:
        """Load the mmproj on first use. Raises PopError if there is no mmproj or loading fails."""
        if self._vision is None:
            raise PopError(
                "cannot read images because the model was opened without an mmproj",
                "open the model with mmproj=PATH, using the mmproj file published with the model",
                cause="no-mmproj",
            )
        return self._vision.open(self.context.model, self.context.settings.n_threads_batch)

    def _with_pictures(
        self, text: str, marks: Mapping[str, str], pictures: Mapping[str, TokenizedPicture]
    ) -> tuple[list[int], dict[int, ImageChunk]]:
        """Return the tokens and images of a rendered prompt that has one placeholder per image."""
        pieces = re.split(f"([{''.join(pictures)}])", text) if pictures else [text]
        if pieces[1::2] != list(pictures):
            raise PopError("the chat template omits images", "send one image at a time")
        tokens: list[int] = []
        images: dict[int, ImageChunk] = {}
        for piece in pieces:
            if piece in pictures:
                chunks = pictures[piece].images
                images |= {len(tokens) + offset: image for offset, image in chunks.items()}
                tokens += pictures[piece].tokens
            elif piece and marks:
                tokens += self._special.tokens(piece, dict(marks))
            elif piece:
                tokens += self.context.vocabulary.tokenize(piece, special=True)
        return tokens, images

    @cached_property
    def _needs_parts(self) -> bool:
        """Return whether the template accepts a message's content only as a list of parts."""
        # BeyondLimitsError propagates, because the conversation would also exceed the limits.
        with suppress(ValueError):
            if self._is_shown({"role": "user", "content": _PROBE}):
                return False
        with suppress(PopError, ValueError):
            parts = [{"type": "text", "text": _PROBE}]
            return self._is_shown({"role": "user", "content": parts})
        return False

    @cached_property
    def _supports_system(self) -> bool:
        with suppress(ValueError):
            return self._is_shown(self._given("system", _PROBE), self._given("user", "a"))
        return False

    def _is_shown(self, *messages: Any) -> bool:
        return _PROBE in self.template.render(messages)

    def _given(self, role: str, content: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": content}]
        return {"role": role, "content": parts if self._needs_parts else content}

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        pairs = zip(messages, contents, strict=True)
        return self.template.render([self._given(each.role, content) for each, content in pairs])


def _with_marks(message: Message, unused: Iterator[str], pictures: dict[str, Picture]) -> str:
    """Return the content with one placeholder per image, and add each placeholder to `pictures`."""
    pieces, at = [], 0
    for offset, picture in message.pictures:
        pictures[mark := next(unused)] = picture
        pieces += [message.content[at:offset], mark]
        at = offset
    return "".join([*pieces, message.content[at:]])


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Move system messages to the start of the next user message, as llama.cpp's chat.cpp does."""
    kept: list[Message] = []
    held: Message | None = None
    for message in messages:
        if held is not None and message.role != "assistant":
            content = f"{held.content}\n{message.content}"
            n_before = len(content) - len(message.content)
            moved = ((n_before + offset, picture) for offset, picture in message.pictures)
            message = Message(message.role, content, (*held.pictures, *moved))
            held = None
        if message.role == "system":
            held = message
        else:
            kept.append(message)
    return kept if held is None else [*kept, replace(held, role="user")]
