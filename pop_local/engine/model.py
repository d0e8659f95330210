"""The Python API's handle to an open model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pop_converter.gguf.source import read_source
from pop_local.engine.answer import Answering
from pop_local.engine.chat_messages import Message
from pop_local.engine.engine import Engine
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prefill.reading import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sessions.chat_session import (
    Answer,
    ChatSession,
    QuestionOptions,
    Stream,
    load_session,
)
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.turn_options import turn_options
from pop_local.models import model_names
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.sidecars import sidecar_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PopModel:
    """An open model. `engine` holds the model's parts."""

    def __init__(self, options: EngineOptions) -> None:
        self.engine = Engine.open(options)

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        sidecar: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Open a GGUF file, or a local model by name, without downloading or converting anything.

        `sidecar`: a path (default: a sidecar next to the model, or a shipped sidecar). `mmproj`: a
        path (default: the mmproj next to the model). `options`: fields of EngineOptions or
        ContextOptions, or llama.cpp parameters. Raises PopError if the model cannot be opened.
        """
        path = model_names.resolve(os.fspath(model))
        return cls(
            EngineOptions.of(
                path,
                sidecar=sidecar_of(read_source(path)) if sidecar is None else sidecar,
                mmproj=find_mmproj(path) if mmproj is None else mmproj,
                **options,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop any read in progress and free the model.

        Waits for batches running in other threads to finish. The other threads then raise PopError.
        """
        self.engine.close()

    @property
    def pruning(self) -> bool:
        """True if prompts are pruned.

        Changing the value empties the KV cache unless all rows are exact. Setting the property to
        True raises PopError if the model has not been converted.
        """
        return self.engine.sequences[0].settings.mode is not Mode.OFF

    @pruning.setter
    def pruning(self, is_on: bool) -> None:
        self.engine.set_mode(Mode.CONTEXT if is_on else Mode.OFF)

    # Questions

    def chat(
        self, question: str, *, system: str = "", **options: Unpack[QuestionOptions]
    ) -> Answer:
        """Answer a single question in a new conversation (see ChatSession.stream)."""
        return self.session(system=system).chat(question, **options)

    def stream(
        self, question: str, *, system: str = "", **options: Unpack[QuestionOptions]
    ) -> Stream:
        """Stream the answer to a single question (see ChatSession.stream)."""
        return self.session(system=system).stream(question, **options)

    def session(self, *, system: str = "") -> ChatSession:
        """Start a conversation."""
        return ChatSession(self.engine, Conversation(system))

    def load_session(self, path: str | os.PathLike[str]) -> ChatSession:
        """Load a conversation saved by ChatSession.save or the `chat` command."""
        return load_session(self.engine, path)

    def read(self, prompt: Prompt, on_prefill: Callable[[int, int], None] | None = None) -> Read:
        """Read a prompt into the KV cache (see prefill.read.read)."""
        return self.engine.sequences[0].read(prompt, on_prefill)

    def ask(self, messages: Sequence[Message], **options: Any) -> Answering:
        """Generate the answer to the last message and yield it in chunks.

        If there is neither a chat template nor an image, the model continues the text of the
        messages. `options`: AnswerOptions, or other fields of TurnOptions.
        Raises PopError if the template rejects the conversation or the prompt cannot be read.
        """
        prompter = self.engine.prompter
        turn = turn_options(self.engine.recommended, options)
        if prompter.has_template or any(message.pictures for message in messages):
            return self.engine.answer(lambda: prompter.conversation(messages), turn)
        text = "\n\n".join(each.content for each in messages)
        return self.engine.answer(lambda: prompter.text(text), turn)
