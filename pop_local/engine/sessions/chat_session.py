"""A conversation that a program or the chat holds with a model.

Asking, answers in pieces, taking back, figures, saving.
"""

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
from pop_local.texts.document import Document

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
    """The pieces of an answer as they come; `stats` are there once it has ended by itself.

    Closing it ends the answer. Whatever ends it, `text` is what was said until then. Closed by its
    own on_prefill or should_stop, it ends as soon as these return, and has its `stats`.
    """

    def __init__(self, chunks: Answering, on_end: Callable[[Stream], None]) -> None:
        self._chunks = chunks
        self._on_end = on_end
        self._said: list[str] = []
        self._is_open = True
        self.is_closing = False
        self.stats: TurnStats | None = None

    @property
    def text(self) -> str:
        return "".join(self._said)

    def __next__(self) -> str:
        for chunk in self._chunks:
            self.stats = chunk.stats
            if chunk.text and not self.is_closing:
                self._said.append(chunk.text)
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
    """A conversation in which every question comes after all that was said before.

    Not for several threads. A model has one KV cache, and gives one answer at a time. Another
    session's question drives this conversation out, which is then read again.
    """

    def __init__(
        self, model: EngineOwner, conversation: Conversation | None = None, *, reread: str = ""
    ) -> None:
        """`reread`: why the conversation has to be read again, or nothing."""
        self.model = model
        self.reread = reread
        self._conversation = conversation or Conversation()
        self._dropped: Turn | None = None
        self._stats: list[TurnStats] = []
        self._stream: Stream | None = None

    @property
    def conversation(self) -> Conversation:
        """The system prompt and all turns so far; an answer that still streams is ended.

        Raises PopError in the on_prefill and should_stop of this very answer.
        """
        self._settle()
        return self._conversation

    @property
    def system(self) -> str:
        """The system prompt, "" for none; another one is read with the next question."""
        return self._conversation.system

    @system.setter
    def system(self, text: str) -> None:
        self._settle()
        self._conversation = replace(self._conversation, system=text)

    @property
    def dropped(self) -> Turn | None:
        """The last question, if nothing was answered to it; it is not part of the conversation."""
        self._settle()
        return self._dropped

    @property
    def last_asked(self) -> Turn | None:
        """The question that retry and edit ask again: the dropped one, or else the last turn's."""
        turns = self.conversation.turns
        return self._dropped or (turns[-1] if turns else None)

    @property
    def n_cached(self) -> int:
        """How many tokens of the conversation need not be read again."""
        return n_own_tokens(self.model.engine, self.conversation)

    @property
    def stats(self) -> SessionStats:
        """The sums over the answers that ended by themselves since this session was opened."""
        return SessionStats.of(self._stats)

    @property
    def answer_stats(self) -> tuple[TurnStats, ...]:
        """The figures of these answers one by one, without those that ended before they began."""
        return tuple(stats for stats in self._stats if stats.n_decoded)

    def chat(
        self,
        question: str,
        *,
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Give the whole answer; images and documents precede the question.

        Raises PopError as `stream`.
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
        """Give the answer in pieces; reading starts with the first one.

        `images`: paths, or the bytes of picture files, for a model with its mmproj.

        When it has ended, by itself, by close() or by Ctrl-C, question and answer belong to the
        conversation; when nothing was said, the question is `dropped`. Raises ContextFullError when
        the prompt does not fit the context, and PopError when the template refuses it.
        """
        turn = Turn(question, _documents(documents), pictures=_pictures(images))
        return self._ask(turn, self.conversation, options)

    def retry(self, **options: Unpack[AnswerOptions]) -> Stream:
        """Ask the last question again; its answer is forgotten. Raises PopError as `stream`, and
        when nothing has been asked yet."""
        return self._ask_again(None, options)

    def edit(self, question: str, **options: Unpack[AnswerOptions]) -> Stream:
        """Ask the last question in other words, about the same documents; as `retry`."""
        return self._ask_again(question, options)

    def undo(self) -> Turn | None:
        """Forget the last turn, and what was dropped after it; None when there is no turn."""
        turns = self.conversation.turns
        if not turns:
            return None
        self._conversation, self._dropped = self._conversation.without_last(), None
        return turns[-1]

    def forget_oldest(self, n_turns: int) -> None:
        """Make room: the rest of the conversation is read again with the next question."""
        self._conversation = self.conversation.without_oldest(n_turns)

    def forget(self) -> None:
        """Forget all turns and their figures; the system prompt stays."""
        self._conversation, self._dropped = Conversation(self.conversation.system), None
        self._stats.clear()

    def _ask_again(self, question: str | None, options: AnswerOptions) -> Stream:
        turn = self.last_asked
        if turn is None:
            raise PopError("nothing has been asked yet")
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
                "the session is in the midst of an answer",
                "on_prefill and should_stop may end it; go on when it has ended",
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write transcript and KV cache to a .popsession file, which gets that suffix, whole or
        not at all; returns its path. Raises PopError.

        The KV cache is the model's: if another session asked last, this one will be read again.
        """
        folder, name = _place(path)
        sessions = Sessions(folder)
        target = sessions.path(name)
        if target.exists() and not overwrite:
            raise OutputExistsError(f"{target} is there already", "overwrite=True replaces it")
        sessions.save(name, self.model.engine, self.conversation)
        return target


def load_session(model: EngineOwner, path: str | os.PathLike[str]) -> ChatSession:
    """Go on with a saved conversation; the model takes over its pruning and its KV cache.

    Where these do not fit the model, `reread` says why, and the next question reads all of it.
    Raises PopError for what is no session.
    """
    folder, name = _place(path)
    sessions = Sessions(folder)
    if not sessions.path(name).is_file():
        raise PopError(f"there is no session {sessions.path(name)}", "check the path")
    restored = sessions.load(name, model.engine)
    return ChatSession(model, restored.session.conversation, reread=restored.reread)


def _place(path: str | os.PathLike[str]) -> tuple[Path, str]:
    given = Path(path)
    return given.parent, given.name.removesuffix(SUFFIX)


def _documents(given: Sequence[str | Document]) -> tuple[Document, ...]:
    if isinstance(given, str):  # a sequence of letters, to Python
        raise PopError("documents is a single text, not a list of them", "documents=[text]")
    return tuple(each if isinstance(each, Document) else Document("a text", each) for each in given)


def _pictures(given: Sequence[GivenImage]) -> tuple[Picture, ...]:
    if isinstance(given, str | bytes | os.PathLike):
        raise PopError("images is a single one, not a list of them", "images=[path]")
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
