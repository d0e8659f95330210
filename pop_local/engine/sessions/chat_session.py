"""Chat sessions of the Python API and the chat: asking, streaming, undoing, saving."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import GEN_RUNNING, getgeneratorstate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_converter.base.errors import OutputExistsError, PopError
from pop_local.engine.answer import Answering
from pop_local.engine.chat_messages import SessionStats, TurnStats
from pop_local.engine.engine import EngineOwner
from pop_local.engine.images.pictures import Picture, picture_of, read_picture
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import SUFFIX, Sessions, n_own_tokens
from pop_local.engine.turn_options import AnswerOptions, TurnOptions
from pop_local.texts.document_readers import Document

if TYPE_CHECKING:
    from typing_extensions import Unpack


# A file's path or its bytes.
GivenImage = str | os.PathLike[str] | bytes | Picture


@dataclass(frozen=True)
class Answer:
    text: str
    stats: TurnStats

    def __str__(self) -> str:
        return self.text


class Stream(Iterator[str]):
    """Text pieces of an answer. `text`: the pieces so far. `stats`: None until the answer is over.

    Closing the stream ends the answer and leaves `stats` at None. If its on_prefill or should_stop
    closes it, the answer ends after that call returns, and `stats` is set.
    """

    def __init__(self, chunks: Answering, on_end: Callable[[Stream], None]) -> None:
        self._chunks = chunks
        self._on_end = on_end
        self._pieces: list[str] = []
        self._is_open = True
        self.is_closing = False
        self.stats: TurnStats | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def __next__(self) -> str:
        for chunk in self._chunks:
            self.stats = chunk.stats
            if chunk.text and not self.is_closing:
                self._pieces.append(chunk.text)
                return chunk.text
        self.close()
        raise StopIteration

    def close(self) -> None:
        self.is_closing = True
        is_running = getgeneratorstate(self._chunks) == GEN_RUNNING
        if self._is_open and not is_running:
            self._is_open = False
            self._chunks.close()
            self._on_end(self)


class ChatSession:
    """A conversation; each prompt contains all earlier turns.

    Sessions are not thread-safe. A model has one KV cache and generates one answer at a time. If
    another session asks a question, this conversation is evicted and must be read again.
    """

    def __init__(
        self, model: EngineOwner, conversation: Conversation | None = None, *, reread: str = ""
    ) -> None:
        """`reread`: the reason for reading the conversation again, or ""."""
        self.model = model
        self.reread = reread
        self._conversation = conversation or Conversation()
        self._dropped: Turn | None = None
        self._stats: list[TurnStats] = []
        self._stream: Stream | None = None

    @property
    def conversation(self) -> Conversation:
        """The system prompt and all turns so far. Accessing them ends a streaming answer.

        Raises PopError if that answer's on_prefill or should_stop accesses the conversation.
        """
        self._settle()
        return self._conversation

    @property
    def system(self) -> str:
        """The system prompt, or ""; a new one takes effect with the next question."""
        return self._conversation.system

    @system.setter
    def system(self, text: str) -> None:
        self._settle()
        self._conversation = replace(self._conversation, system=text)

    @property
    def dropped(self) -> Turn | None:
        """The last question if it has no answer; the conversation excludes it."""
        self._settle()
        return self._dropped

    @property
    def last_asked(self) -> Turn | None:
        """The question that retry and edit repeat: the dropped one, or else the last turn's."""
        turns = self.conversation.turns
        return self._dropped or (turns[-1] if turns else None)

    @property
    def n_cached(self) -> int:
        """The number of cached tokens of the conversation."""
        return n_own_tokens(self.model.engine, self.conversation)

    @property
    def stats(self) -> SessionStats:
        """Sums over this session's answers that were not closed early."""
        return SessionStats.of(self._stats)

    @property
    def answer_stats(self) -> tuple[TurnStats, ...]:
        """The statistics of each of these answers, without those that have no token."""
        return tuple(stats for stats in self._stats if stats.n_decoded)

    def chat(
        self,
        question: str,
        *,
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Return the whole answer; images and documents precede the question.

        Raises PopError like `stream`.
        """
        stream = self.stream(question, documents=documents, images=images, **options)
        for _ in stream:
            pass
        assert stream.stats is not None, "the last chunk carries the figures"
        return Answer(stream.text, stream.stats)

    def stream(
        self,
        question: str,
        *,
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Stream the answer; prefill starts when the caller requests the first piece.

        `images`: paths or contents of image files, for a model with its mmproj.

        After the end, close() or Ctrl-C, the conversation includes question and answer. If the
        answer is empty, the question is `dropped` instead. Raises ContextFullError if the prompt
        exceeds the context, and PopError if the template rejects it.
        """
        turn = Turn(question, _documents(documents), pictures=_pictures(images))
        return self._ask(turn, self.conversation, options)

    def retry(self, **options: Unpack[AnswerOptions]) -> Stream:
        """Replace the last question's answer by a new one.

        Raises PopError like `stream`, and if the session has no question yet.
        """
        return self._ask_again(None, options)

    def edit(self, question: str, **options: Unpack[AnswerOptions]) -> Stream:
        """Replace the last question, keep its documents and images, and ask it like `retry`."""
        return self._ask_again(question, options)

    def undo(self) -> Turn | None:
        """Remove and return the last turn, None if no turn exists; also clear `dropped`."""
        turns = self.conversation.turns
        if not turns:
            return None
        self._conversation, self._dropped = self._conversation.without_last(), None
        return turns[-1]

    def forget_oldest(self, n_turns: int) -> None:
        """Remove the first `n_turns` turns; the next question reads the rest again."""
        self._conversation = self.conversation.without_oldest(n_turns)

    def forget(self) -> None:
        """Remove all turns and their statistics, but keep the system prompt."""
        self._conversation, self._dropped = Conversation(self.conversation.system), None
        self._stats.clear()

    def _ask_again(self, question: str | None, options: AnswerOptions) -> Stream:
        turn = self.last_asked
        if turn is None:
            raise PopError("the session has no question yet", "ask one first")
        question = turn.question if question is None else question
        before = self.conversation if self._dropped else self.conversation.without_last()
        asked = Turn(question, turn.documents, pictures=turn.pictures)
        return self._ask(asked, before, options)

    def _ask(self, turn: Turn, before: Conversation, options: AnswerOptions) -> Stream:
        if not turn.prompt and not turn.pictures:
            raise PopError("the question is empty", "give a question, or a document")

        def keep(ended: Stream) -> None:
            self._stream = None
            if ended.text:
                self._conversation = before.plus(replace(turn, answer=ended.text))
                self._dropped = None
            if ended.stats is not None:
                self._stats.append(ended.stats)

        asked = options.get("should_stop")
        options["should_stop"] = lambda: stream.is_closing or (asked is not None and asked())
        engine, messages = self.model.engine, before.plus(turn).messages
        chosen: dict[str, Any] = {**engine.recommended, **options}
        chunks = engine.answer(
            lambda: engine.prompter.conversation(messages), TurnOptions(**chosen)
        )
        self._stream = stream = Stream(chunks, keep)
        self._conversation, self._dropped = before, turn
        return stream

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._stream is not None:
            raise PopError(
                "the session is still answering",
                "use it after the answer has ended; on_prefill and should_stop may only end it",
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write transcript and KV cache atomically; return the path, with suffix .popsession.

        If another session asked last, the file lacks the KV cache, and loading it rereads the
        conversation. Raises PopError.
        """
        folder, name = _split(path)
        sessions = Sessions(folder)
        target = sessions.path(name)
        if target.exists() and not overwrite:
            raise OutputExistsError(f"{target} exists", "replace it with overwrite=True")
        sessions.save(name, self.model.engine, self.conversation)
        return target


def load_session(model: EngineOwner, path: str | os.PathLike[str]) -> ChatSession:
    """Load a saved conversation; the model adopts its mode and its KV cache.

    If these do not fit the model, `reread` is the reason, and the next question rereads the
    conversation. Raises PopError if the file is not a session.
    """
    folder, name = _split(path)
    sessions = Sessions(folder)
    if not sessions.path(name).is_file():
        raise PopError(f"no session {sessions.path(name)}", "check the path")
    restored = sessions.load(name, model.engine)
    return ChatSession(model, restored.session.conversation, reread=restored.reread)


def _split(path: str | os.PathLike[str]) -> tuple[Path, str]:
    given = Path(path)
    return given.parent, given.name.removesuffix(SUFFIX)


def _documents(given: Sequence[str | Document]) -> tuple[Document, ...]:
    if isinstance(given, str):  # iterates over its characters
        raise PopError("documents is a string, not a list", "use documents=[text]")
    return tuple(each if isinstance(each, Document) else Document("a text", each) for each in given)


def _pictures(given: Sequence[GivenImage]) -> tuple[Picture, ...]:
    if isinstance(given, str | bytes | os.PathLike):
        raise PopError("images is a single image, not a list", "use images=[path]")
    return tuple(map(_picture, given))


def _picture(given: GivenImage) -> Picture:
    if isinstance(given, Picture):
        return given
    if isinstance(given, bytes):
        return picture_of(given, "a picture")
    try:
        return read_picture(given)
    except OSError as error:
        raise PopError(f"cannot read {given}: {error.strerror}", "check the path") from error
