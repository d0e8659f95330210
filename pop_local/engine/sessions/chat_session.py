"""Chat sessions: questions, streamed answers, undo, and saved files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import GEN_RUNNING, getgeneratorstate
from pathlib import Path
from typing import TYPE_CHECKING

from pop_base.errors import OutputExistsError, PopError
from pop_local.engine.answer import Answering
from pop_local.engine.chat_messages import SessionStats, TurnStats
from pop_local.engine.engine import Engine
from pop_local.engine.images.pictures import Picture, picture_of, read_picture
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import SUFFIX, read_session, write_session
from pop_local.engine.turn_options import AnswerOptions, turn_options
from pop_local.texts.document_readers import Document

if TYPE_CHECKING:
    from typing_extensions import Unpack


# A file's path or bytes, or a picture.
GivenImage = str | os.PathLike[str] | bytes | Picture


class QuestionOptions(AnswerOptions, total=False):
    """Keyword arguments for ChatSession.stream."""

    documents: Sequence[str | Document]
    images: Sequence[GivenImage]


@dataclass(frozen=True)
class Answer:
    """A complete answer and its statistics."""

    text: str
    stats: TurnStats

    def __str__(self) -> str:
        return self.text


class Stream(Iterator[str]):
    """An iterator over an answer. `text`: the text so far. `stats`: None until the answer ends.

    Closing the stream ends the answer and leaves `stats` as None. If the on_prefill or should_stop
    callback closes the stream, the answer ends when the callback returns, and `stats` is set.
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
    """A conversation in which each prompt contains all earlier turns.

    Sessions are not thread-safe. A model has one KV cache and generates one answer at a time.
    After a question is asked in another session, the model must reread this conversation.
    """

    def __init__(
        self, engine: Engine, conversation: Conversation | None = None, *, reread: str = ""
    ) -> None:
        """`reread`: why the KV cache in the session's file cannot be used, or ""."""
        self.engine = engine
        self.reread = reread
        self._conversation = conversation or Conversation()
        self._dropped: Turn | None = None
        self._stats: list[TurnStats] = []
        self._stream: Stream | None = None

    @property
    def conversation(self) -> Conversation:
        """The system prompt and all turns so far. Accessing this property closes any open stream.

        Raises PopError if the stream's on_prefill or should_stop callback accesses this property.
        """
        self._settle()
        return self._conversation

    @property
    def system(self) -> str:
        """The system prompt, or "" if none exists. Changes apply from the next question on."""
        return self._conversation.system

    @system.setter
    def system(self, text: str) -> None:
        self._settle()
        self._conversation = replace(self._conversation, system=text)

    @property
    def dropped(self) -> Turn | None:
        """The last question, if it is unanswered. `conversation` omits unanswered questions."""
        self._settle()
        return self._dropped

    @property
    def last_asked(self) -> Turn | None:
        """The turn that `retry` and `edit` repeat: `dropped` or, if that is None, the last turn."""
        turns = self.conversation.turns
        return self._dropped or (turns[-1] if turns else None)

    @property
    def stats(self) -> SessionStats:
        """Totals for this session's answers, excluding answers that were closed early."""
        return SessionStats.of(self._stats)

    @property
    def answer_stats(self) -> tuple[TurnStats, ...]:
        """Statistics for each answer in `stats`, excluding answers that have no tokens."""
        return tuple(stats for stats in self._stats if stats.n_decoded)

    def chat(self, question: str, **options: Unpack[QuestionOptions]) -> Answer:
        """Return the complete answer. Other threads cannot use the model until the answer ends.

        Arguments and errors are the same as for `stream`.
        """
        with self.engine.context.locked():
            stream = self.stream(question, **options)
            for _ in stream:
                pass
        assert stream.stats is not None
        return Answer(stream.text, stream.stats)

    def stream(
        self,
        question: str,
        *,
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Stream the answer. Prefill starts when the caller requests the first piece.

        `images`: paths to image files, or the files' contents (requires an mmproj). In the prompt,
        images and documents precede the question.

        After the stream ends, is closed, or is interrupted by Ctrl-C, the conversation includes the
        question and the answer. If the answer is empty, the question is moved to `dropped` instead.
        Raises ContextFullError if the prompt exceeds the context, or PopError if the template
        rejects the prompt.
        """
        turn = Turn(question, _documents(documents), pictures=_pictures(images))
        return self._ask(turn, self.conversation, options)

    def retry(self, **options: Unpack[AnswerOptions]) -> Stream:
        """Regenerate the last answer.

        Raises the same errors as `stream`, or PopError if there is no question to answer again.
        """
        return self.edit(None, **options)

    def edit(self, question: str | None, **options: Unpack[AnswerOptions]) -> Stream:
        """Replace the last question's text if `question` is not None, and answer again."""
        turn = self.last_asked
        if turn is None:
            raise PopError("there is no question to answer again", "call chat or stream first")
        before = self.conversation if self._dropped else self.conversation.without_last()
        question = turn.question if question is None else question
        return self._ask(replace(turn, question=question, answer=""), before, options)

    def undo(self) -> Turn | None:
        """Remove and return the last turn (None if there are no turns), and clear `dropped`."""
        turns = self.conversation.turns
        if not turns:
            return None
        self._conversation, self._dropped = self._conversation.without_last(), None
        return turns[-1]

    def forget_oldest(self, n_turns: int) -> None:
        """Remove the first `n_turns` turns. The model must then reread the remaining turns."""
        self._conversation = self.conversation.without_oldest(n_turns)

    def forget(self) -> None:
        """Remove all turns and their statistics, but keep the system prompt."""
        self._conversation, self._dropped = Conversation(self.conversation.system), None
        self._stats.clear()

    def _ask(self, turn: Turn, before: Conversation, options: AnswerOptions) -> Stream:
        if not turn.prompt and not turn.pictures:
            raise PopError("the question is empty", "pass a question, a document, or an image")

        def keep(ended: Stream) -> None:
            self._stream = None
            if ended.text:
                self._conversation = before.plus(replace(turn, answer=ended.text))
                self._dropped = None
            if ended.stats is not None:
                self._stats.append(ended.stats)

        asked = options.get("should_stop")
        options["should_stop"] = lambda: stream.is_closing or (asked is not None and asked())
        engine, messages = self.engine, before.plus(turn).messages
        chunks = engine.answer(
            lambda: engine.prompter.conversation(messages),
            turn_options(engine.recommended, options),
        )
        self._stream = stream = Stream(chunks, keep)
        self._conversation, self._dropped = before, turn
        return stream

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._stream is not None:
            raise PopError(
                "the session is still generating an answer",
                "wait for the answer to finish (inside a callback, you can only close the stream)",
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the transcript atomically, and return the file's path (*.popsession).

        Raises PopError if the file already exists or cannot be written.
        """
        target = _session_path(path)
        if target.exists() and not overwrite:
            raise OutputExistsError(f"{target} exists", "pass overwrite=True to replace the file")
        write_session(target, self.engine, self.conversation)
        return target


def load_session(engine: Engine, path: str | os.PathLike[str]) -> ChatSession:
    """Load a saved conversation, and restore its prefill mode if the model can be pruned.

    Raises PopError if the file is not a session file.
    """
    target = _session_path(path)
    if not target.is_file():
        raise PopError(f"no session {target}", "check the path")
    engine.context.require_usable()
    session = read_session(target)
    if session.mode is not None and engine.sequences[0].settings.can_switch:
        engine.set_mode(session.mode, keeps_exact=True)
    return ChatSession(engine, session.conversation, reread=session.reread)


def _session_path(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given.with_name(given.name.removesuffix(SUFFIX) + SUFFIX)


def _documents(documents: Sequence[str | Document]) -> tuple[Document, ...]:
    if isinstance(documents, str):  # a sequence of characters
        raise PopError("documents must be a list, not a string", "use documents=[text]")
    return tuple(Document("a text", text) if isinstance(text, str) else text for text in documents)


def _pictures(given: Sequence[GivenImage]) -> tuple[Picture, ...]:
    if isinstance(given, str | bytes | os.PathLike):
        raise PopError("images must be a list, not a single image", "use images=[path]")
    return tuple(map(_picture, given))


def _picture(given: GivenImage) -> Picture:
    if isinstance(given, bytes):
        return picture_of(given, "a picture")
    try:
        return given if isinstance(given, Picture) else read_picture(given)
    except OSError as error:
        raise PopError(f"cannot read {given}: {error.strerror}", "check the path") from error
