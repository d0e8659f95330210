"""OpenAI's embeddings, and Ollama's."""

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pop_local.engine.tools.reader import Piece
from pop_local.engine.turn import TokenLogprob
from pop_local.server.api import Api
from pop_local.server.bodies import EmbeddingsBody, Named
from pop_local.server.models import Served
from pop_local.server.replies import End, Json, OwnReply, total
from pop_local.server.tasks import Tasks


class EmbeddingsReply(OwnReply):
    def __init__(self, served: Served, *, is_packed: bool) -> None:
        super().__init__(served)
        self._is_packed = is_packed

    def whole(self, said: Sequence[Piece], logprobs: Sequence[TokenLogprob], end: End) -> Json:
        found: Any = end.embedding
        if self._is_packed:
            found = b64encode(np.asarray(found, "<f4").tobytes()).decode()
        return {"object": "embedding", "index": self._index, "embedding": found}

    def joined(self, wholes: Sequence[Json], ends: Sequence[End]) -> Json:
        figures = total(ends)
        n = figures["prompt_tokens"]
        usage = {"prompt_tokens": n, "total_tokens": n, "pop": figures["pop"]}
        return {"object": "list", "data": list(wholes), "model": self._model, "usage": usage}


class EmbedReply(OwnReply):
    def whole(self, said: Sequence[Piece], logprobs: Sequence[TokenLogprob], end: End) -> Json:
        return {"embedding": end.embedding}

    def joined(self, wholes: Sequence[Json], ends: Sequence[End]) -> Json:
        return {
            "model": self._model,
            "embeddings": [whole["embedding"] for whole in wholes],
            "prompt_eval_count": total(ends)["prompt_tokens"],
        }


class OneText(Named):
    prompt: str


class OneEmbedReply(EmbedReply):
    def joined(self, wholes: Sequence[Json], ends: Sequence[End]) -> Json:
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
    return await api.answer(request, body, Tasks.embeddings, reply)


async def _embed(api: Api, request: Request) -> Response:
    body = await api.read(request, EmbeddingsBody)
    return await api.answer(request, body, Tasks.embeddings, EmbedReply)


async def _embed_one(api: Api, request: Request) -> Response:
    """Ollama's older endpoint."""
    asked = await api.read(request, OneText)
    body = EmbeddingsBody.model_validate({"model": asked.model, "input": asked.prompt})
    return await api.answer(request, body, Tasks.embeddings, OneEmbedReply)
