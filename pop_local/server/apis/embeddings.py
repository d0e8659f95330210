"""Embeddings in the APIs of OpenAI and Ollama."""

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field
from starlette.routing import Route

from pop_local.server.api import Api
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import AnswerEnd, Json, OtherApiReply, total
from pop_local.server.request_bodies import EmbeddingsBody
from pop_local.server.task_factory import TaskFactory


class EmbeddingsReply(OtherApiReply):
    def __init__(self, served: ServedModel, body: EmbeddingsBody) -> None:
        super().__init__(served, body)
        self._is_packed = body.encoding_format == "base64"

    def whole(self, end: AnswerEnd) -> Json:
        found: Any = end.embedding
        if self._is_packed:
            found = b64encode(np.asarray(found, "<f4").tobytes()).decode()
        return {"object": "embedding", "index": self._index, "embedding": found}

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        figures = total(ends)
        n = figures["prompt_tokens"]
        usage = {"prompt_tokens": n, "total_tokens": n, "pop": figures["pop"]}
        return {"object": "list", "data": list(wholes), "model": self._model, "usage": usage}


class OllamaEmbedReply(OtherApiReply):
    def whole(self, end: AnswerEnd) -> Json:
        return {"embedding": end.embedding}

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        return {
            "model": self._model,
            "embeddings": [whole["embedding"] for whole in wholes],
            "prompt_eval_count": total(ends)["prompt_tokens"],
        }


class OllamaTextBody(EmbeddingsBody):
    """A request to /api/embeddings, Ollama's older endpoint."""

    input: str = Field(alias="prompt")


class OllamaEmbeddingReply(OllamaEmbedReply):
    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        return wholes[0]


def routes(api: Api) -> list[Route]:
    make = TaskFactory.embeddings
    return [
        api.route("/v1/embeddings", EmbeddingsBody, make, EmbeddingsReply),
        api.route("/api/embed", EmbeddingsBody, make, OllamaEmbedReply),
        api.route("/api/embeddings", OllamaTextBody, make, OllamaEmbeddingReply),
    ]
