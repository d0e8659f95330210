"""OpenAI's APIs for models, chat completions, text completions, and embeddings."""

import time
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_local.server.api import Api
from pop_local.server.model_listing import ModelInfo
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import AnswerEnd, ChatReply, Json, OtherApiReply, Reply, total
from pop_local.server.request_bodies import ChatBody, CompletionBody, EmbeddingsBody
from pop_local.server.task_factory import TaskFactory


class EmbeddingsReply(OtherApiReply):
    def __init__(self, served: ServedModel, body: EmbeddingsBody) -> None:
        super().__init__(served, body)
        self._is_packed = body.encoding_format == "base64"

    def whole(self, end: AnswerEnd) -> Json:
        vector: Any = end.embedding
        if self._is_packed:
            vector = b64encode(np.asarray(vector, "<f4").tobytes()).decode()
        return {"object": "embedding", "index": self._index, "embedding": vector}

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Json:
        figures = total(ends)
        n = figures["prompt_tokens"]
        usage = {"prompt_tokens": n, "total_tokens": n, "pop": figures["pop"]}
        return {"object": "list", "data": list(wholes), "model": self._model, "usage": usage}


def routes(api: Api) -> list[Route]:
    started_s = int(time.time())
    return [
        Route("/v1/models", partial(_list, api, started_s)),
        Route("/v1/models/{name:path}", partial(_show, api, started_s)),
        api.route("/v1/chat/completions", ChatBody, TaskFactory.chat, ChatReply),
        Route("/v1/chat/completions/input_tokens", partial(_count, api), methods=["POST"]),
        api.route("/v1/completions", CompletionBody, TaskFactory.completions, Reply),
        api.route("/v1/embeddings", EmbeddingsBody, TaskFactory.embeddings, EmbeddingsReply),
    ]


async def _count(api: Api, request: Request) -> Response:
    return await api.count(request, await api.read(request, ChatBody))


async def _list(api: Api, started_s: int, request: Request) -> Response:
    models = [_card(info, started_s) for info in await api.models.listed()]
    return JSONResponse({"object": "list", "data": models})


async def _show(api: Api, started_s: int, request: Request) -> Response:
    file = api.models.find(name := request.path_params["name"])
    if file is None:
        raise api.unknown_model(name)
    return JSONResponse(_card(await api.models.info(file), started_s))


def _card(info: ModelInfo, created_s: int) -> Json:
    return {
        "id": info.name,
        "object": "model",
        "created": created_s,
        "owned_by": "pop-local",
        "pop": {
            "n_ctx": info.n_ctx,
            "boundary": info.boundary,
            "images": info.can_see,
            "exact": info.exact,
            "loaded": info.is_loaded,
        },
    }
