"""The routes: `create_app` makes a Starlette application of a model."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from converter.errors import PopError
from pop_local.engine.model import PopModel
from pop_local.server.answers import Answer
from pop_local.server.bodies import Body, ChatBody, CompletionBody
from pop_local.server.entry import entry_rule
from pop_local.server.errors import ApiError, as_api_error, as_request_error, hung_up
from pop_local.server.front import Front
from pop_local.server.metrics import Metrics
from pop_local.server.replies import ChatReply, CompletionReply, Reply
from pop_local.server.tasks import Asked, Tasks
from pop_local.server.worker import Job, Worker

_MIN_BODY_BYTES = 1024 * 1024
_BODY_BYTES_PER_TOKEN = 64

AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True)
class ServerOptions:
    """`name`: of the model in the API. `api_key`: "" for none. `max_body_bytes` 0: by context.

    `host`: what the server listens on; without a key it answers to this and loopback names only.
    """

    name: str
    api_key: str = ""
    host: str = "127.0.0.1"
    max_waiting: int = 64
    max_body_bytes: int = 0


def create_app(model: PopModel, options: ServerOptions) -> Starlette:
    """The application; from the start of its lifespan to its end the model belongs to it.

    `app.state.worker` is the thread that has the model: stop it to end running answers.
    """
    api = Api(model, options)
    handled = (Exception, PopError, HTTPException, ApiError, ClientDisconnect)
    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/metrics", api.figures),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.one_model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        lifespan=api.lifespan,
        exception_handlers=dict.fromkeys(handled, _refuse),
    )
    refusal = entry_rule(options.api_key, options.host)
    app.add_middleware(Front, metrics=api.metrics, refusal=refusal)
    if options.api_key:  # no web page has it unless its user gave it
        app.add_middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
        )
    app.state.worker = api.worker
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return hung_up().response
    return as_api_error(error).response


class Api:
    """The endpoints of one model."""

    def __init__(self, model: PopModel, options: ServerOptions) -> None:
        self._model = model
        self._options = options
        self._created = int(time.time())
        self._tasks = Tasks(model)
        by_context = max(_MIN_BODY_BYTES, _BODY_BYTES_PER_TOKEN * model.n_ctx())
        self._max_body_bytes = options.max_body_bytes or by_context
        self._watchers: set[asyncio.Task[None]] = set()
        self.metrics = Metrics()
        self.worker = Worker(model, self.metrics, options.max_waiting)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            self.worker.stop()
            await run_in_threadpool(self.worker.join)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request) -> Response:
        return Response(self.metrics.text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._options.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pop-local",
            "pop": {
                "n_ctx": self._model.n_ctx(),
                "boundary": self._model.boundary,
                "exact": self._model.exact,
            },
        }

    def _check_name(self, name: str | None) -> None:
        served = self._options.name
        if name is not None and name.lower() != served.lower():
            raise ApiError(
                404,
                f"there is no model named {name!r} here; this server has {served!r}",
                code="model_not_found",
                param="model",
            )

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        asked = await run_in_threadpool(self._tasks.chat, body)
        reply = ChatReply(self._options.name, wants_logprobs=bool(body.logprobs))
        return await self._answer(request, body, asked, reply)

    async def complete(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        asked = await run_in_threadpool(self._tasks.completion, body)
        reply = CompletionReply(
            self._options.name,
            wants_logprobs=body.logprobs is not None,
            n_written=0 if body.echo else asked.n_characters,
        )
        return await self._answer(request, body, asked, reply)

    async def _body(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > self._max_body_bytes:
                raise self._too_large()
        try:
            body = kind.model_validate_json(bytes(raw))
        except ValidationError as error:
            raise as_request_error(error) from error
        self._check_name(body.model)
        return body

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._max_body_bytes:,} bytes; the context of this"
            f" server holds {self._model.n_ctx():,} tokens",
            code="request_too_large",
        )

    async def _answer(self, request: Request, body: Body, asked: Asked, reply: Reply) -> Response:
        job = self.worker.submit(asked.task)
        self._cancel_when_gone(request, job)
        answer = Answer(request, job, reply, asked.reason)
        if not body.stream:
            return await answer.whole()
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            answer.stream(wants_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def _cancel_when_gone(self, request: Request, job: Job) -> None:
        """Also while nothing is being sent, and where the answer is not streamed."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.cancel()

        watcher = asyncio.create_task(watch())
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
