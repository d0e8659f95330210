"""OpenAI's endpoints and the server's own, and what all doors share: bodies, models, answers."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pop_converter.base.errors import StoppedError
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.server.api_errors import ApiError, hung_up
from pop_local.server.job_responses import streamed_answer, whole_answer
from pop_local.server.model_listing import ModelFile, ModelInfo
from pop_local.server.model_pool import ModelPool, ServedModel
from pop_local.server.replies import ChatReply, Reply
from pop_local.server.request_bodies import ChatBody, CompletionBody, GenerationBody, ModelRequest
from pop_local.server.request_images import MAX_BYTES, MAX_DATA_URL, n_in_pictures
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Job, Task

_MAYBE_NO_NUMBER = re.compile(rb"[:,\[\s](?:NaN|-?Infinity|-?\d[\d.]*[eE]\+?\d{3})")
_MIN_BODY_BYTES = 1024 * 1024
_BODY_BYTES_PER_TOKEN = 32

AnyRequest = TypeVar("AnyRequest", bound=ModelRequest)
AnyBody = TypeVar("AnyBody", bound=GenerationBody)
Made = TypeVar("Made")


class Api:
    def __init__(self, models: ModelPool, *, strict_model: bool) -> None:
        self.models = models
        self._is_strict = strict_model
        self._created = int(time.time())
        self._max_body_bytes = max(
            _MIN_BODY_BYTES, _BODY_BYTES_PER_TOKEN * models.registry.most_ctx
        )
        self._max_picture_bytes = MAX_DATA_URL if models.registry.can_see else 0
        self._grammar_limit = anyio.CapacityLimiter(1)
        self._picture_limit = anyio.CapacityLimiter(1)
        self._watchers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.models.start()
        try:
            yield
        finally:
            self.models.stop()
            await run_in_threadpool(self.models.join)

    async def health(self, request: Request) -> Response:
        if silent_s := self.models.silent_s():
            raise ApiError(503, f"the model has not come back for {silent_s:.0f} s")
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request) -> Response:
        text = self.models.metrics.text
        return Response(text, media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        cards = list(map(self._card, await self.models.listed()))
        return JSONResponse({"object": "list", "data": cards})

    async def one_model(self, request: Request) -> Response:
        file = self.models.find(name := request.path_params["name"])
        if file is None:
            raise self._absent(name)
        return JSONResponse(self._card(await self.models.about(file)))

    def _card(self, about: ModelInfo) -> dict[str, Any]:
        return {
            "id": about.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pop-local",
            "pop": {
                "n_ctx": about.n_ctx,
                "boundary": about.boundary,
                "images": about.can_see,
                "exact": about.exact,
                "loaded": about.is_loaded,
            },
        }

    def _absent(self, name: str | None) -> ApiError:
        here = ", ".join(map(repr, self.models.names)) or "none"
        named = f" named {name!r}" if name else ""
        return ApiError(
            404,
            f"there is no model{named} here; this server has {here}",
            code="model_not_found",
            param="model",
        )

    async def chat(self, request: Request) -> Response:
        body = await self.read(request, ChatBody)
        reply = partial(ChatReply, wants_usage=body.wants_usage)
        return await self.answer(request, body, TaskFactory.chat, reply)

    async def complete(self, request: Request) -> Response:
        body = await self.read(request, CompletionBody)
        reply = partial(Reply, wants_usage=body.wants_usage)
        return await self.answer(request, body, TaskFactory.completions, reply)

    def file(self, request: Request, name: str | None) -> ModelFile:
        """Return the model that answers to a name, which may be another one. Raises ApiError."""
        file = self.models.find(name)
        if name and file is None:
            if self._is_strict:
                raise self._absent(name)
            request.state.asked = name
        file = file or self.models.default
        if file is None:
            raise self._absent(name)
        request.state.answering = file.name
        return file

    async def served(self, request: Request, name: str | None) -> ServedModel:
        """Return the model that answers to a name, open until the response is sent.

        Raises ApiError, also once the client has hung up.
        """
        lease = await self.models.lease(self.file(request, name))
        request.state.held.callback(lease.end)
        self._gone(request).add_done_callback(lambda _: lease.refuse(hung_up()))
        return await lease.served

    async def work(self, request: Request, served: ServedModel, work: Callable[[], Made]) -> Made:
        """Do it in a thread, until the client has hung up."""
        gone, worker = self._gone(request), served.worker

        def done() -> Made:
            worker.require_open()
            with stopped_by(lambda: gone.done() or worker.is_stopping):
                return work()

        try:
            return await run_in_threadpool(done)
        except StoppedError:
            worker.require_open()
            raise hung_up() from None

    async def made(
        self,
        request: Request,
        served: ServedModel,
        body: AnyBody,
        make: Callable[[TaskFactory, AnyBody], list[Task]],
    ) -> list[Task]:
        """Make tasks in a thread; grammars and pictures one at a time, so that they take the
        memory of one.
        """
        async with AsyncExitStack() as limits:
            if body.has_grammar:
                await limits.enter_async_context(self._grammar_limit)
            if body.has_pictures:
                await limits.enter_async_context(self._picture_limit)
            return await self.work(request, served, lambda: make(served.tasks, body))

    async def read(self, request: Request, kind: type[AnyRequest]) -> AnyRequest:
        """Return the body, within the limits. Raises ApiError and ValidationError."""
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
        return body

    def _too_large(self, n_other: int) -> ApiError:
        message = (
            f"the request is larger than {self._max_body_bytes:,} bytes; the context of this server"
            f" holds {self.models.registry.most_ctx:,} tokens"
        )
        if n_other <= self._max_body_bytes:
            message = f"the pictures of a request may have {MAX_BYTES >> 20} MiB together"
        return ApiError(413, message, code="request_too_large")

    async def answer(
        self,
        request: Request,
        body: AnyBody,
        make: Callable[[TaskFactory, AnyBody], list[Task]],
        reply: Callable[[ServedModel], Reply],
    ) -> Response:
        """Answer tasks one after the other; others may be answered in between."""
        served, gone = await self.served(request, body.model), self._gone(request)
        form = reply(served)

        def submit(task: Task) -> Job:
            job = served.worker.submit(task)
            gone.add_done_callback(lambda _: job.cancel())
            return job

        first, *others = await self.made(request, served, body, make)
        jobs = chain([submit(first)], map(submit, others))
        if not body.stream:
            return await whole_answer(request.state, jobs, form)
        return StreamingResponse(
            streamed_answer(request.state, jobs, form),
            media_type=form.media_type,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def _gone(self, request: Request) -> "asyncio.Task[None]":
        """Return what is done once the client has hung up."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        state = request.state
        if not hasattr(state, "gone"):
            state.gone = asyncio.create_task(watch())
            self._watchers.add(state.gone)
            state.gone.add_done_callback(self._watchers.discard)
        gone: asyncio.Task[None] = state.gone
        return gone


def _require_numbers(raw: bytes | bytearray) -> None:
    """Raises ApiError for NaN, and for what is infinite; pydantic lets both through in schemas."""
    try:
        json.dumps(json.loads(raw), allow_nan=False)
    except ValueError as error:
        raise ApiError(400, "NaN, Infinity and numbers beyond 1e308 are no JSON") from error
