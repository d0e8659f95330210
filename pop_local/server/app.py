"""The routes: `create_app` makes a Starlette application of a model, `run_app` serves it."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from types import FrameType
from typing import Any

import anyio
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pop_local.base.errors import PopError, StoppedError
from pop_local.engine.learning.lesson import Teacher
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.server.answers import streamed_answer, whole_answer
from pop_local.server.bodies import ChatBody, CompletionBody
from pop_local.server.connections import ACCEPTED_AT_ONCE, Connection, max_connections
from pop_local.server.doors.embeddings import Embeddings
from pop_local.server.doors.house import AnyBody, AnyNamed, Made
from pop_local.server.doors.llama_server import LlamaServer
from pop_local.server.doors.messages import Messages
from pop_local.server.doors.ollama import Ollama
from pop_local.server.doors.responses import Responses
from pop_local.server.errors import ApiError, as_api_error, hung_up
from pop_local.server.front import LOCAL_ORIGIN, Entry, Front
from pop_local.server.memory import return_large_blocks
from pop_local.server.metrics import Metrics
from pop_local.server.page import routes as page
from pop_local.server.pictures import MAX_BYTES, MAX_DATA_URL, n_in_pictures
from pop_local.server.replies import ChatReply, Reply
from pop_local.server.tasks import Tasks
from pop_local.server.worker import Job, Task, Worker

_MAYBE_NO_NUMBER = re.compile(rb"[:,\[\s](?:NaN|-?Infinity|-?\d[\d.]*[eE]\+?\d{3})")
_MIN_BODY_BYTES = 1024 * 1024
_BODY_BYTES_PER_TOKEN = 32
_LAST_WORDS_S = 5
_AT_LAST_S = 8.0
_BACKLOG = 128

log = logging.getLogger("pop_local.server")


def create_app(
    model: PopModel,
    name: str,
    *,
    api_key: str = "",
    host: str = "127.0.0.1",
    max_waiting: int = 256,
    max_body_bytes: int = 0,
    repeatable: bool = False,
    teacher: Teacher | None = None,
    strict_model: bool = False,
    origins: Sequence[str] = (),
) -> Starlette:
    """Make the application; the model belongs to it from the start of its lifespan to its end.

    `name`: the model's in the API. `api_key`: "" for none. `host`: the address that the server
    listens on; without a key it answers to this and loopback names only. `max_body_bytes` 0: by
    context. `repeatable`: see TurnOptions; a request may say otherwise. `teacher`: makes fits of
    what the model learns, between requests. `strict_model`: whether requests for other models are
    refused, not answered by this one. `origins`: of web pages that may ask without a key, beside
    those of this machine.
    `app.state.worker` is the thread that has the model: stop it to end running answers.
    """
    api = Api(model, name, max_waiting, max_body_bytes, repeatable, teacher, strict_model)
    handled = (Exception, PopError, HTTPException, ValidationError, ClientDisconnect)
    routes = [
        Route("/health", api.health),
        Route("/v1/health", api.health),
        Route("/metrics", api.figures),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        *Ollama(api).routes,
        *LlamaServer(api).routes,
        *Responses(api).routes,
        *Messages(api).routes,
        *Embeddings(api).routes,
        *page.routes(),
    ]
    app = Starlette(
        routes=routes,
        lifespan=api.lifespan,
        exception_handlers=dict.fromkeys(handled, _refuse),
    )
    app.add_middleware(
        Front,
        metrics=api.metrics,
        entry=Entry(api_key, host, tuple(origin.lower() for origin in origins)),
        name=name,
        paths=frozenset(route.path for route in routes),
    )
    app.add_middleware(
        CORSMiddleware,
        # With a key any page may ask: none has it unless its user gave it.
        allow_origins=["*"] if api_key else [origin.lower() for origin in origins],
        allow_origin_regex=LOCAL_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Model"],
    )
    app.state.worker = api.worker
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


class Api:
    """The endpoints of one model."""

    def __init__(
        self,
        model: PopModel,
        name: str,
        max_waiting: int,
        max_body_bytes: int,
        repeatable: bool,
        teacher: Teacher | None,
        strict_model: bool,
    ) -> None:
        self.model = model
        self.name = name
        self._is_strict = strict_model
        self._created = int(time.time())
        self.tasks = Tasks(model, repeatable=repeatable)
        by_context = max(_MIN_BODY_BYTES, _BODY_BYTES_PER_TOKEN * model.n_ctx)
        self._max_body_bytes = max_body_bytes or by_context
        self._max_picture_bytes = MAX_DATA_URL if model.can_see else 0
        self._watchers: set[asyncio.Task[None]] = set()
        self.metrics = Metrics()
        self.worker = Worker(model, self.metrics, max_waiting, teacher)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._grammar_limit = anyio.CapacityLimiter(1)
        self._picture_limit = anyio.CapacityLimiter(1)
        self.worker.start()
        try:
            yield
        finally:
            self.worker.stop()
            await run_in_threadpool(self.worker.join)

    async def health(self, request: Request) -> Response:
        if silent_s := self.worker.silent_s():
            raise ApiError(503, f"the model has not come back for {silent_s:.0f} s")
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request) -> Response:
        return Response(self.metrics.text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        if not self._is_here(name := request.path_params["name"]):
            raise self._absent(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pop-local",
            "pop": {
                "n_ctx": self.model.n_ctx,
                "boundary": self.model.boundary,
                "images": self.model.can_see,
                "exact": self.model.exact,
            },
        }

    def _is_here(self, name: str) -> bool:
        return name.lower() in (self.name.lower(), f"{self.name.lower()}:latest")

    def _absent(self, name: str) -> ApiError:
        return ApiError(
            404,
            f"there is no model named {name!r} here; this server has {self.name!r}",
            code="model_not_found",
            param="model",
        )

    async def chat(self, request: Request) -> Response:
        body = await self.read(request, ChatBody)
        reply = ChatReply(self.name, wants_usage=body.wants_usage)
        return await self.answer(request, body, self.tasks.chat, reply)

    async def complete(self, request: Request) -> Response:
        body = await self.read(request, CompletionBody)
        reply = Reply(self.name, wants_usage=body.wants_usage)
        return await self.answer(request, body, self.tasks.completions, reply)

    async def work(self, request: Request, work: Callable[[], Made]) -> Made:
        return await self._done(work, self._gone(request))

    async def made(
        self, request: Request, body: AnyBody, make: Callable[[AnyBody], list[Task]]
    ) -> list[Task]:
        return await self._tasks_of(make, body, self._gone(request))

    async def _done(self, work: Callable[[], Made], gone: "asyncio.Task[None]") -> Made:
        """Return what is made in a thread until the client has hung up."""

        def done() -> Made:
            self.worker.require_open()
            with stopped_by(lambda: gone.done() or self.worker.is_stopping):
                return work()

        try:
            return await run_in_threadpool(done)
        except StoppedError:
            self.worker.require_open()
            raise hung_up() from None

    async def _tasks_of(
        self, make: Callable[[AnyBody], list[Task]], body: AnyBody, gone: "asyncio.Task[None]"
    ) -> list[Task]:
        """Check grammars and pictures one at a time, so that they take the memory of one."""
        async with AsyncExitStack() as limits:
            if body.has_grammar:
                await limits.enter_async_context(self._grammar_limit)
            if body.has_pictures:
                await limits.enter_async_context(self._picture_limit)
            return await self._done(lambda: make(body), gone)

    async def read(self, request: Request, kind: type[AnyNamed]) -> AnyNamed:
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > self._max_body_bytes + self._max_picture_bytes:
                raise self._too_large(len(raw) - n_in_pictures(raw))
        if (n_other := len(raw) - n_in_pictures(raw)) > self._max_body_bytes:
            raise self._too_large(n_other)
        body = kind.model_validate_json(raw)
        if _MAYBE_NO_NUMBER.search(raw):
            _require_numbers(raw)
        if body.model and not self._is_here(body.model):
            if self._is_strict:
                raise self._absent(body.model)
            request.state.asked = body.model
        return body

    def _too_large(self, n_other: int) -> ApiError:
        message = (
            f"the request is larger than {self._max_body_bytes:,} bytes; the context of this server"
            f" holds {self.model.n_ctx:,} tokens"
        )
        if n_other <= self._max_body_bytes:
            message = f"the pictures of a request may have {MAX_BYTES >> 20} MiB together"
        return ApiError(413, message, code="request_too_large")

    async def answer(
        self, request: Request, body: AnyBody, make: Callable[[AnyBody], list[Task]], reply: Reply
    ) -> Response:
        """Answer tasks one after the other; others may be answered in between."""
        gone = self._gone(request)

        def submit(task: Task) -> Job:
            job = self.worker.submit(task)
            gone.add_done_callback(lambda _: job.cancel())
            return job

        first, *others = await self._tasks_of(make, body, gone)
        jobs = chain([submit(first)], map(submit, others))
        if not body.stream:
            return await whole_answer(request.state, jobs, reply)
        return StreamingResponse(
            streamed_answer(request.state, jobs, reply),
            media_type=reply.media_type,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def _gone(self, request: Request) -> "asyncio.Task[None]":
        """Return what is done once the client has hung up."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        watcher = asyncio.create_task(watch())
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return watcher


def _require_numbers(raw: bytes | bytearray) -> None:
    """Raises ApiError for NaN, and for what is infinite; pydantic lets both through in schemas."""
    try:
        json.dumps(json.loads(raw), allow_nan=False)
    except ValueError as error:
        raise ApiError(400, "NaN, Infinity and numbers beyond 1e308 are no JSON") from error


class _Server(uvicorn.Server):
    """uvicorn waits for answers to end; here a signal ends them, and the process if need be."""

    worker: Worker
    end: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)  # more than asyncio is told to accept at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.worker.stop()
        if self.end is None:
            self.end = threading.Timer(_AT_LAST_S, _end, (sig,))
            self.end.daemon = True
            self.end.start()
            if hasattr(signal, "setitimer"):  # threads of Python no longer run while it winds down
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, _AT_LAST_S + 1)
        super().handle_exit(sig, frame)


def _end(sig: int) -> None:
    log.error("the model does not come back: ended without it")
    os._exit(128 + sig)


def run_app(app: Starlette, listening: socket.socket) -> None:
    """Serve until a signal, and raise what it raises once nobody uses the model any more."""
    return_large_blocks()
    config = uvicorn.Config(
        app,
        lifespan="on",
        http=Connection,
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        limit_concurrency=max_connections(),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    server = _Server(config)
    server.worker = app.state.worker
    try:
        server.run(sockets=[listening])
    finally:
        # After a second signal uvicorn leaves without the end of the lifespan.
        server.worker.stop()
        if server.worker.is_alive():
            server.worker.join()
        if server.end is not None:
            server.end.cancel()
