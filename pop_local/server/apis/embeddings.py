"""Embeddings by the APIs of OpenAI and Ollama."""

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pop_local.server.api import Api
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import AnswerEnd, CompleteAnswer, Json, OtherApiReply, total
from pop_local.server.request_bodies import EmbeddingsBody, ModelRequest
from pop_local.server.task_factory import TaskFactory


class EmbeddingsReply(OtherApiReply):
    def __init__(self, served: ServedModel, *, is_packed: bool) -> None:
        super().__init__(served)
        self._is_packed = is_packed

    def whole(self, answer: CompleteAnswer) -> Json:
        found: Any = answer.end.embedding
        if self._is_packed:
            found = b64encode(np.asarray(found, "<f4").tobytes()).decode()
        return {"object": "embedding", "index": self._index, "embedding": found}

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        figures = total(ends)
        n = figures["prompt_tokens"]
        usage = {"prompt_tokens": n, "total_tokens": n, "pop": figures["pop"]}
        return {"object": "list", "data": list(wholes), "model": self._model, "usage": usage}


class OllamaEmbedReply(OtherApiReply):
    def whole(self, answer: CompleteAnswer) -> Json:
        return {"embedding": answer.end.embedding}

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        return {
            "model": self._model,
            "embeddings": [whole["embedding"] for whole in wholes],
            "prompt_eval_count": total(ends)["prompt_tokens"],
        }


class OllamaTextBody(ModelRequest):
    prompt: str


class OllamaEmbeddingReply(OllamaEmbedReply):
    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        return wholes[0]


def routes(api: Api) -> list[Route]:
    return [
        Route("/v1/embeddings", partial(_create, api), methods=["POST"]),
        Route("/api/embed", partial(_embed, api), methods=["POST"]),
        Route("/api/embeddings", partial(_embed_one, api), methods=["POST"]),
    ]


async def _create(api: Api, request: Request) -> Response:
    body = await api.read(request, EmbeddingsBody)
    reply = partial(EmbeddingsReply, is_packed=body.encoding_format == "base64")
    return await api.answer(request, body, TaskFactory.embeddings, reply)


async def _embed(api: Api, request: Request) -> Response:
    body = await api.read(request, EmbeddingsBody)
    return await api.answer(request, body, TaskFactory.embeddings, OllamaEmbedReply)


async def _embed_one(api: Api, request: Request) -> Response:
    """Answer Ollama's older endpoint."""
    sent = await api.read(request, OllamaTextBody)
    body = EmbeddingsBody.model_validate({"model": sent.model, "input": sent.prompt})
    return await api.answer(request, body, TaskFactory.embeddings, OllamaEmbeddingReply)
