"""The model as programs use it: opened by name or path, asked, and closed again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pop_converter.gguf.source import read_source
from pop_local.engine.open_model import OpenModel
from pop_local.engine.sessions.chat_session import (
    Answer,
    ChatSession,
    GivenImage,
    Stream,
    load_session,
)
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.turn import AnswerOptions
from pop_local.models import model_names
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.sidecars import sidecar_of
from pop_local.texts.document import Document

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PopModel(OpenModel):
    """An open model that is found by its name, and holds conversations. Raises PopError."""

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        sidecar: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        learn: bool = False,
        **options: Any,
    ) -> Self:
        """Open a GGUF file, or a model that is here by its name.

        `sidecar`, `mmproj`: None takes the one beside the model, if there is one; a model of the
        catalog has a sidecar in this package. `learn`: see OpenModel.learn. The rest is as in the
        constructor. Nothing is fetched or converted.
        """
        path = model_names.resolve(os.fspath(model))
        opened = cls(
            path,
            sidecar=sidecar_of(read_source(path)) if sidecar is None else sidecar,
            mmproj=find_mmproj(path) if mmproj is None else mmproj,
            **options,
        )
        if learn:
            opened.learn()
        return opened

    def chat(
        self,
        question: str,
        *,
        system: str = "",
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer one question that has nothing before it; see ChatSession.chat."""
        return self.session(system=system).chat(
            question, documents=documents, images=images, **options
        )

    def stream(
        self,
        question: str,
        *,
        system: str = "",
        documents: Sequence[str | Document] = (),
        images: Sequence[GivenImage] = (),
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Answer it in pieces, as they come; see ChatSession.stream."""
        return self.session(system=system).stream(
            question, documents=documents, images=images, **options
        )

    def session(self, *, system: str = "") -> ChatSession:
        """Begin a conversation that remembers."""
        return ChatSession(self, Conversation(system))

    def load_session(self, path: str | os.PathLike[str]) -> ChatSession:
        """Go on with a conversation that ChatSession.save, or the chat, has written."""
        return load_session(self, path)
