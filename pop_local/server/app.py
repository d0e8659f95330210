"""The Starlette application with all routes, and the uvicorn server that runs it."""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from types import FrameType

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_converter.base.errors import PopError
from pop_local.server.access import LOCAL_ORIGIN, AccessMiddleware, AccessRules
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError, as_api_error
from pop_local.server.apis import embeddings, llama_server, messages, ollama, openai, responses
from pop_local.server.connections import ACCEPTED_AT_ONCE, Connection, max_connections
from pop_local.server.model_pool import ModelPool
from pop_local.server.page import page_routes

_FAREWELL_S = 5  # for sending the last events of running answers
_KILL_S = 8.0
_BACKLOG = 128
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BYTES = 1 << 20

log = logging.getLogger("pop_local.server")


def create_app(models: ModelPool, rules: AccessRules, *, strict_model: bool = False) -> Starlette:
    """Create the application of a model pool, whose workers run during its lifespan.

    `strict_model` refuses requests for unknown models, which the default model would answer. To end
    running answers, call `app.state.models.stop()`.
    """
    api = Api(models, strict_model=strict_model)
    handled = (Exception, PopError, HTTPException, ValidationError, ClientDisconnect)
    routes = [
        Route("/health", partial(_health, models)),
        Route("/v1/health", partial(_health, models)),
        Route("/metrics", partial(_metrics, models)),
        *openai.routes(api),
        *ollama.routes(api),
        *llama_server.routes(api),
        *responses.routes(api),
        *messages.routes(api),
        *embeddings.routes(api),
        *page_routes.routes(),
    ]
    app = Starlette(
        routes=routes,
        lifespan=api.lifespan,
        exception_handlers=dict.fromkeys(handled, _refuse),
    )
    app.add_middleware(
        AccessMiddleware,
        metrics=models.metrics,
        rules=rules,
        paths=frozenset(route.path for route in routes),
    )
    app.add_middleware(
        CORSMiddleware,
        # With a key every origin is safe: a page has the key only if its user entered it.
        allow_origins=["*"] if rules.api_key else rules.origins,
        allow_origin_regex=LOCAL_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Model"],
    )
    app.state.models = models
    return app


async def _health(models: ModelPool, request: Request) -> Response:
    if hung_s := models.hung_s():
        raise ApiError(503, f"the model has not responded for {hung_s:.0f} s")
    return JSONResponse({"status": "ok"})


async def _metrics(models: ModelPool, request: Request) -> Response:
    return Response(models.metrics.text, media_type="text/plain; version=0.0.4")


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


class _Server(uvicorn.Server):
    """A uvicorn server that ends answers at a signal, and kills the process if they hang."""

    models: ModelPool
    end: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)  # `backlog` also sets how many connections asyncio accepts at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.models.stop()
        if self.end is None:
            self.end = threading.Timer(_KILL_S, _end, (sig,))
            self.end.daemon = True
            self.end.start()
            if hasattr(signal, "setitimer"):  # no Python thread runs during finalization
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, _KILL_S + 1)
        super().handle_exit(sig, frame)


def _end(sig: int) -> None:
    log.error("the model hangs: killed the process")
    os._exit(128 + sig)


def run_app(app: Starlette, listening: socket.socket) -> None:
    """Serve until a signal. Return, or raise KeyboardInterrupt, once no thread uses a model."""
    _return_large_blocks()
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
        timeout_graceful_shutdown=_FAREWELL_S,
    )
    server = _Server(config)
    server.models = app.state.models
    try:
        server.run(sockets=[listening])
    finally:
        # After a second signal, uvicorn skips the end of the lifespan.
        server.models.stop()
        server.models.join()
        if server.end is not None:
            server.end.cancel()


def _return_large_blocks() -> None:
    """Return freed blocks of 1 MiB and more to the system; without glibc, do nothing.

    By default glibc raises this threshold up to 32 MiB, and smaller blocks come from heaps. There
    the cached states, which have many sizes, leave gaps as large as themselves.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
