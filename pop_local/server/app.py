"""The routes: `create_app` makes a Starlette application of a model, `run_app` serves it."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pop_local.base.errors import PopError
from pop_local.engine.learning.lesson import Teacher
from pop_local.engine.model import PopModel
from pop_local.server.api import Api
from pop_local.server.connections import ACCEPTED_AT_ONCE, Connection, max_connections
from pop_local.server.doors.embeddings import Embeddings
from pop_local.server.doors.llama_server import LlamaServer
from pop_local.server.doors.messages import Messages
from pop_local.server.doors.ollama import Ollama
from pop_local.server.doors.responses import Responses
from pop_local.server.errors import as_api_error
from pop_local.server.front import LOCAL_ORIGIN, Entry, Front
from pop_local.server.listing import File
from pop_local.server.memory import return_large_blocks
from pop_local.server.models import Models, Opened
from pop_local.server.page import routes as page

_LAST_WORDS_S = 5
_AT_LAST_S = 8.0
_BACKLOG = 128

log = logging.getLogger("pop_local.server")


def create_app(
    model: PopModel,
    name: str,
    *,
    max_waiting: int = 256,
    repeatable: bool = False,
    teacher: Teacher | None = None,
    api_key: str = "",
    host: str = "127.0.0.1",
    max_body_bytes: int = 0,
    strict_model: bool = False,
    origins: Sequence[str] = (),
) -> Starlette:
    """Make the application of one model, by its name in the API; see Models and `create_app_of`.

    The model belongs to it from the start of its lifespan to its end. `repeatable`: see
    TurnOptions; a request may say otherwise. `teacher`: makes fits of what the model learns,
    between requests.
    """
    file, opened = File(name, model.path), Opened(model, teacher)
    return create_app_of(
        Models.of_one(file, opened, max_waiting=max_waiting, repeatable=repeatable),
        api_key=api_key,
        host=host,
        max_body_bytes=max_body_bytes,
        strict_model=strict_model,
        origins=origins,
    )


def create_app_of(
    models: Models,
    *,
    api_key: str = "",
    host: str = "127.0.0.1",
    max_body_bytes: int = 0,
    strict_model: bool = False,
    origins: Sequence[str] = (),
) -> Starlette:
    """Make the application of models, which work during its lifespan.

    `api_key`: "" for none. `host`: the address that the server listens on; without a key it
    answers to this and loopback names only. `max_body_bytes` 0: by context. `strict_model`: whether
    requests for other models are refused, not answered by the default one. `origins`: of web pages
    that may ask without a key, beside those of this machine. `app.state.models`: stop them to end
    running answers.
    """
    api = Api(models, max_body_bytes, strict_model)
    handled = (Exception, PopError, HTTPException, ValidationError, ClientDisconnect)
    routes = [
        Route("/health", api.health),
        Route("/v1/health", api.health),
        Route("/metrics", api.figures),
        Route("/v1/models", api.list_models),
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
        metrics=models.metrics,
        entry=Entry(api_key, host, tuple(origin.lower() for origin in origins)),
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
    app.state.models = models
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


class _Server(uvicorn.Server):
    """uvicorn waits for answers to end; here a signal ends them, and the process if need be."""

    models: Models
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
    server.models = app.state.models
    try:
        server.run(sockets=[listening])
    finally:
        # After a second signal uvicorn leaves without the end of the lifespan.
        server.models.stop()
        server.models.join()
        if server.end is not None:
            server.end.cancel()
