"""The Python API's handle to an open model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_local.engine.answer import Answering
from pop_local.engine.chat_messages import Message
from pop_local.engine.engine import Engine
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.learning.online_calibrator import OnlineCalibrator
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
from pop_local.engine.turn_options import TurnOptions
from pop_local.models import model_names
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.sidecars import sidecar_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PopModel:
    """An open model."""

    def __init__(self, options: EngineOptions) -> None:
        self._engine = Engine.open(options)
        self._lock = threading.RLock()
        if options.learn:
            self.learn()

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

    @property
    def engine(self) -> Engine:
        """The model's parts. Methods such as `learn` replace the engine."""
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop any read in progress and free the model.

        Waits for batches running in other threads to finish. The other threads then raise PopError.
        """
        self._engine.close()

    def swap_sidecar(self, sidecar: Path) -> None:
        """Switch to a different sidecar. The cache is kept if all its rows are exact.

        Raises PopError and changes nothing if opening fails or if the model uses an mmproj.
        """
        with self._changing() as before:
            before.context.interrupt.require_idle()
            if before.vision is not None:
                raise PopError(
                    "the sidecar cannot be changed while a model with an mmproj is open",
                    "close the model and reopen it with the new sidecar",
                )
            cache = before.cache
            state = before.states.save() if 0 < cache.n_tokens == cache.n_exact else None
            options = replace(
                before.options,
                sidecar=sidecar,
                keep_states=before.refiller.is_on,
                prompt_cache=before.states.prompts,
            )
            engine = Engine.open(options)
            if cache.pruning.can_switch and cache.pruning.mode is Mode.OFF:
                engine.set_mode(Mode.OFF)
            engine.prompter.parse_special = before.prompter.parse_special
            if state is not None:
                with suppress(PopError):  # on failure, the next prompt is read from the start
                    engine.states.restore(state)
            # The old context stays open while another thread uses it.
            self._engine = replace(engine, calibrator=before.calibrator)
            if before.calibrator is not None:
                before.calibrator.attach(engine.cache)

    def learn(self, memory_bytes: int | None = None) -> None:
        """Start learning from rows that run through all layers (docs/learning.md).

        `memory_bytes`: memory limit for the sums and the queued rows (default: see
        OnlineCalibrator). Raises PopError if the model cannot be fitted.
        """
        with self._changing() as engine:
            calibrator = OnlineCalibrator(engine.cache, memory_bytes)
            self._engine = replace(engine, calibrator=calibrator)

    @contextmanager
    def _changing(self) -> Iterator[Engine]:
        """Context manager that prevents other threads from using or replacing the engine.

        Progress callbacks hold the context's lock, so locking the context second could deadlock.
        """
        while True:
            engine = self._engine
            with engine.context.locked(), self._lock:
                if engine is self._engine:  # otherwise another thread has replaced it
                    yield engine
                    return

    @property
    def pruning(self) -> bool:
        """True if prompts are pruned.

        Changing the value empties the KV cache unless all rows are exact. Setting the property to
        True raises PopError if the model has not been converted.
        """
        return self._engine.pruning.mode is not Mode.OFF

    @pruning.setter
    def pruning(self, is_on: bool) -> None:
        self._engine.set_mode(Mode.CONTEXT if is_on else Mode.OFF)

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
        return ChatSession(self, Conversation(system))

    def load_session(self, path: str | os.PathLike[str]) -> ChatSession:
        """Load a conversation saved by ChatSession.save or the `chat` command."""
        return load_session(self, path)

    def read(self, prompt: Prompt, on_prefill: Callable[[int, int], None] | None = None) -> Read:
        """Read a prompt into the KV cache (see prefill.read.read)."""
        return self._engine.sequences[0].read(prompt, on_prefill)

    def ask(self, messages: Sequence[Message], **options: Any) -> Answering:
        """Generate the answer to the last message and yield it in chunks.

        If there is neither a chat template nor an image, the model continues the text of the
        messages. `options`: fields of TurnOptions (defaults: the file's recommended values).
        Raises PopError if the template rejects the conversation or the prompt cannot be read.
        """
        prompter = self._engine.prompter
        chosen: dict[str, Any] = self._engine.recommended | options
        if prompter.has_template or any(message.pictures for message in messages):
            return self._engine.answer(
                lambda: prompter.conversation(messages), TurnOptions(**chosen)
            )
        text = "\n\n".join(each.content for each in messages)
        return self._engine.answer(lambda: prompter.text(text), TurnOptions(**chosen))
