"""Request handling shared by all APIs."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pop_base.errors import StoppedError
from pop_local.engine.decode.grammar import N_COMPILING
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.server.api_errors import ApiError, client_gone
from pop_local.server.client_limits import ClientLimiter
from pop_local.server.job_responses import streamed_answer, whole_answer
from pop_local.server.model_listing import ModelFile
from pop_local.server.model_pool import ModelPool, ServedModel
from pop_local.server.replies import Reply
from pop_local.server.request_bodies import ChatBody, GenerationBody, ModelRequest
from pop_local.server.request_images import MAX_BYTES, MAX_DATA_URL, n_image_bytes
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Job, Task

_MAYBE_NO_NUMBER = re.compile(rb"[:,\[\s](?:NaN|-?Infinity|-?\d[\d.]*[eE]\+?\d{3})")
_MIN_BODY_BYTES = 1024 * 1024
_BODY_BYTES_PER_TOKEN = 32

AnyRequest = TypeVar("AnyRequest", bound=ModelRequest)
AnyBody = TypeVar("AnyBody", bound=GenerationBody)
Result = TypeVar("Result")
MakeTasks = Callable[[TaskFactory, AnyBody], list[Task]]
MakeReply = Callable[[ServedModel, AnyBody], Reply]


class Api:
    def __init__(self, models: ModelPool) -> None:
        self.models = models
        max_ctx = models.registry.max_ctx
        self._max_body_bytes = max(_MIN_BODY_BYTES, _BODY_BYTES_PER_TOKEN * max_ctx)
        self._max_image_bytes = MAX_DATA_URL if models.registry.can_see else 0
        self._grammars = ClientLimiter(N_COMPILING, 1, models.registry.max_waiting)
        self._alone = ClientLimiter(math.inf, 1, models.registry.max_waiting)
        # To limit memory use, only one request at a time decodes images.
        self._image_limit = anyio.CapacityLimiter(1)
        self._watchers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.models.start()
        try:
            yield
        finally:
            self.models.stop()
            await run_in_threadpool(self.models.join)

    async def read(self, request: Request, kind: type[AnyRequest]) -> AnyRequest:
        """Read and validate a request's body.

        Raises ApiError or ValidationError if the body is too large or invalid.
        """
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if is_full := len(raw) > self._max_body_bytes + self._max_image_bytes:
                break
        if len(raw) - n_image_bytes(raw) > self._max_body_bytes:
            message = (
                f"the request is larger than {self._max_body_bytes:,} bytes, the limit for this"
                f" server's context of {self.models.registry.max_ctx:,} tokens"
            )
            raise ApiError(413, message, code="request_too_large")
        if is_full:
            message = f"the images in a request are limited to a total of {MAX_BYTES >> 20} MiB"
            raise ApiError(413, message, code="request_too_large")
        body = kind.model_validate_json(raw)
        if _MAYBE_NO_NUMBER.search(raw):  # Pydantic accepts NaN and infinity in JSON schemas
            try:
                json.dumps(json.loads(raw), allow_nan=False)
            except ValueError as error:
                message = "JSON cannot contain NaN, Infinity, or numbers beyond 1e308"
                raise ApiError(400, message) from error
        return body

    def require_file(self, request: Request, name: str | None) -> ModelFile:
        """Return the file for the requested or default model. Raises ApiError."""
        file = self.models.find(name)
        if name and file is None:
            if self.models.registry.strict_model:
                raise self.unknown_model(name)
            request.state.requested = name
        file = file or self.models.default
        if file is None:
            raise self.unknown_model(name)
        request.state.answering = file.name
        return file

    def unknown_model(self, name: str | None) -> ApiError:
        names = ", ".join(map(repr, self.models.registry.files())) or "no models"
        listing = f"this server serves {names}"
        message = f"no model named {name!r} exists; {listing}" if name else listing
        return ApiError(404, message, code="model_not_found", param="model")

    async def served(self, request: Request, name: str | None) -> ServedModel:
        """Return the requested or default model, and keep it open until the response is sent.

        Raises ApiError if the model cannot be opened, the queue is full, or the client disconnects.
        """
        lease = await self.models.lease(self.require_file(request, name))
        request.state.held.callback(lease.end)
        self._disconnected(request).add_done_callback(lambda _: lease.refuse(client_gone()))
        return await lease.served

    async def work(
        self, request: Request, served: ServedModel, function: Callable[[], Result]
    ) -> Result:
        """Call `function` in a thread. Raises ApiError on disconnect or shutdown."""
        gone, worker = self._disconnected(request), served.worker

        def stoppable() -> Result:
            worker.require_open()
            with stopped_by(lambda: gone.done() or worker.stopping.is_set()):
                return function()

        try:
            return await run_in_threadpool(stoppable)
        except StoppedError:
            worker.require_open()
            raise client_gone() from None

    async def tasks(
        self, request: Request, served: ServedModel, body: AnyBody, make: MakeTasks[AnyBody]
    ) -> list[Task]:
        async with AsyncExitStack() as limits:
            if body.has_grammar:
                await limits.enter_async_context(self._grammars.turn(request.state.client))
            if isinstance(body, ChatBody) and body.has_images:
                await limits.enter_async_context(self._image_limit)
            return await self.work(request, served, lambda: make(served.tasks, body))

    async def prepared(self, request: Request, chat: ChatBody) -> tuple[ServedModel, Task]:
        """Return a chat request's model and first task, without running the task."""
        served = await self.served(request, chat.model)
        first, *_ = await self.tasks(request, served, chat, TaskFactory.chat)
        return served, first

    async def count(self, request: Request, chat: ChatBody) -> Response:
        """Return a response that contains the number of tokens in a chat's prompt."""
        _, task = await self.prepared(request, chat)
        return JSONResponse({"input_tokens": len(task.prompt)})

    async def answer(
        self, request: Request, body: AnyBody, make: MakeTasks[AnyBody], reply: MakeReply[AnyBody]
    ) -> Response:
        """Run a request's tasks in order and return the response.

        Other requests may run between the tasks.
        """
        served, gone = await self.served(request, body.model), self._disconnected(request)
        form = reply(served, body)

        def submit(task: Task) -> Job:
            job = served.worker.submit(replace(task, cache_scope=request.state.cache_scope))
            gone.add_done_callback(lambda _: job.cancel())
            return job

        first, *later = await self.tasks(request, served, body, make)
        if first.alone and len(served.model.engine.sequences) > 1:
            await self._alone.wait(request.state.client, request.state.held)
        jobs = chain([submit(first)], map(submit, later))
        if not body.stream:
            return await whole_answer(request.state, jobs, form)
        return StreamingResponse(
            streamed_answer(request.state, jobs, form),
            media_type=form.media_type,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def route(
        self, path: str, kind: type[AnyBody], make: MakeTasks[AnyBody], reply: MakeReply[AnyBody]
    ) -> Route:
        """Return a route that reads a body of type `kind` and runs the tasks built by `make`."""

        async def handle(request: Request) -> Response:
            return await self.answer(request, await self.read(request, kind), make, reply)

        return Route(path, handle, methods=["POST"])

    def _disconnected(self, request: Request) -> "asyncio.Task[None]":
        """Return an asyncio task that finishes when the client disconnects."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        state = request.state
        if not hasattr(state, "disconnected"):
            state.disconnected = asyncio.create_task(watch())
            self._watchers.add(state.disconnected)
            state.disconnected.add_done_callback(self._watchers.discard)
        task: asyncio.Task[None] = state.disconnected
        return task
