"""The routes: `create_app` makes a Starlette application of models, `run_app` serves it."""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pop_converter.base.errors import PopError
from pop_local.server.access import LOCAL_ORIGIN, AccessMiddleware, AccessRules
from pop_local.server.api import Api
from pop_local.server.api_errors import as_api_error
from pop_local.server.apis import embeddings, llama_server, messages, ollama, responses
from pop_local.server.connections import ACCEPTED_AT_ONCE, Connection, max_connections
from pop_local.server.model_pool import ModelPool
from pop_local.server.page import page_routes

_LAST_WORDS_S = 5
_AT_LAST_S = 8.0
_BACKLOG = 128
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BYTES = 1 << 20

log = logging.getLogger("pop_local.server")


def create_app(models: ModelPool, entry: AccessRules, *, strict_model: bool = False) -> Starlette:
    """Make the application of models, which work during its lifespan, and belong to it.

    `strict_model`: whether requests for other models are refused, not answered by the default one.
    `app.state.models`: stop them to end running answers.
    """
    api = Api(models, strict_model=strict_model)
    handled = (Exception, PopError, HTTPException, ValidationError, ClientDisconnect)
    routes = [
        Route("/health", api.health),
        Route("/v1/health", api.health),
        Route("/metrics", api.figures),
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
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
        entry=entry,
        paths=frozenset(route.path for route in routes),
    )
    app.add_middleware(
        CORSMiddleware,
        # With a key any page may ask: none has it unless its user gave it.
        allow_origins=["*"] if entry.api_key else entry.origins,
        allow_origin_regex=LOCAL_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Model"],
    )
    app.state.models = models
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


class _Server(uvicorn.Server):
    """uvicorn waits for answers to end; here a signal ends them, and the process if need be."""

    models: ModelPool
    end: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)  # more than asyncio is told to accept at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.models.stop()
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
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    server = _Server(config)
    server.models = app.state.models
    try:
        server.run(sockets=[listening])
    finally:
        # After a second signal uvicorn leaves without the end of the lifespan.
        server.models.stop()
        server.models.join()
        if server.end is not None:
            server.end.cancel()


def _return_large_blocks() -> None:
    """Have this process give freed blocks of 1 MiB and more back to the system.

    glibc raises that limit to the largest block that was freed, 32 MiB at most. Smaller blocks come
    from heaps, where a cache's states of all sizes leave gaps as large as themselves. Without glibc
    this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
