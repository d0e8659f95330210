"""The HTTP server: routes, listening socket, and shutdown."""

import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_local.server.access import LOCAL_ORIGIN, AccessMiddleware, AccessRules
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError, as_api_error
from pop_local.server.apis import llama_server, messages, ollama, openai, responses
from pop_local.server.connections import ACCEPTED_AT_ONCE, Connection, max_connections
from pop_local.server.model_pool import ModelPool
from pop_local.server.page import page_routes

_FAREWELL_S = 5  # time limit for sending the last events of running answers
_KILL_S = 8.0
_BACKLOG = 128
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BYTES = 1 << 20
_MAX_PATH = 100  # maximum length of a path in an error message
_BIND_HINTS = {
    errno.EADDRINUSE: "another program is using this port; pass --port 0 to use any free port",
    errno.EADDRNOTAVAIL: "pass an address of this machine, or 0.0.0.0 to listen on all interfaces",
    errno.EACCES: "ports below 1024 are reserved; pass a higher port, for example --port 8080",
}

log = logging.getLogger("pop_local.server")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to `port` (0: any free port). Raises PopError.

    The caller binds the socket before opening a model so that a busy port is reported immediately.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"{host} is not an address of this machine: {reason}"
        raise PopError(message, _BIND_HINTS[errno.EADDRNOTAVAIL]) from error
    if sys.platform != "win32":  # on Windows, the option lets two servers share a port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> PopError:
    hint = _BIND_HINTS.get(error.errno or 0, "pass --port 0 to use any free port")
    return PopError(f"cannot listen on {host} port {port}: {error.strerror}", hint)


def serve_models(
    pool: ModelPool, listening: socket.socket, rules: AccessRules, on_ready: Callable[[str], None]
) -> None:
    """Serve models until a signal arrives, then close the pool and the socket.

    Calls `on_ready` with the server's URL once clients can connect. Raises PopError.
    """
    try:
        app = create_app(pool, rules)
        host, port = listening.getsockname()[:2]
        try:
            listening.listen(_BACKLOG)
        except OSError as error:  # another program took the port after bind()
            raise _cannot_listen(host, port, error) from error
        on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        run_app(app, listening)
    finally:
        listening.close()
        pool.close()


def log_to_stderr(formatter: logging.Formatter) -> None:
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    log.addHandler(handler)


def create_app(models: ModelPool, rules: AccessRules) -> Starlette:
    """Return the ASGI app for a model pool. The workers run during the app's lifespan."""
    api = Api(models)

    async def health(request: Request) -> Response:
        return JSONResponse(models.health())

    async def metrics(request: Request) -> Response:
        text = generate_latest(models.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    routes = [
        Route("/health", health),
        Route("/v1/health", health),
        Route("/metrics", metrics),
        *openai.routes(api),
        *ollama.routes(api),
        *llama_server.routes(api),
        *responses.routes(api),
        *messages.routes(api),
        *page_routes.routes(),
    ]
    # Some clients append an endpoint's path to the server's address without /v1.
    short = [(route.path.removeprefix("/v1"), route) for route in routes]
    taken = {route.path for route in routes}
    routes += [
        Route(path, long.endpoint, methods=long.methods)
        for path, long in short
        if path not in taken
    ]
    handled = (Exception, PopError, HTTPException, ValidationError, ClientDisconnect)
    paths = frozenset(route.path for route in routes)
    shown_paths = {path: path for path in paths if "{" not in path and path != "/"}

    async def refuse(request: Request, error: Exception) -> Response:
        path = request.url.path
        if type(error) is HTTPException and error.status_code == 404:  # not an ApiError
            hint = nearest_hint(path[:_MAX_PATH], shown_paths, "see docs/server.md")
            error = ApiError(404, f"unknown path {path[:_MAX_PATH]!r}; {hint}")
        response = as_api_error(error).response(path)
        if response.status_code == 413 and "expect" not in request.headers:
            # Closing a socket with unread data resets the connection before the client reads this.
            with suppress(RuntimeError, ClientDisconnect):  # the body has been read
                async for _ in request.stream():
                    pass
        return response

    app = Starlette(
        routes=routes, lifespan=api.lifespan, exception_handlers=dict.fromkeys(handled, refuse)
    )
    app.add_middleware(AccessMiddleware, metrics=models.metrics, rules=rules, paths=paths)
    app.add_middleware(
        CORSMiddleware,
        # With a key, every origin is safe: a page has the key only if its user entered it.
        allow_origins=["*"] if rules.api_keys else rules.origins,
        allow_origin_regex=LOCAL_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Model"],
    )
    app.state.models = models
    # Without keys, an address identifies a client, so local clients must not choose theirs.
    app.state.has_proxy = bool(rules.api_keys)
    return app


class _Server(uvicorn.Server):
    """A uvicorn server. A signal stops all answers and, if a model hangs, kills the process."""

    models: ModelPool
    end: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # uvicorn listened with ACCEPTED_AT_ONCE

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        def end() -> None:
            log.error("the model is not responding: killing the process")
            os._exit(128 + sig)

        self.models.stop()
        page_routes.reader.close()
        if self.end is None:
            self.end = threading.Timer(_KILL_S, end)
            self.end.daemon = True
            self.end.start()
            if hasattr(signal, "setitimer"):  # no Python thread runs during finalization
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, _KILL_S + 1)
        super().handle_exit(sig, frame)


def run_app(app: Starlette, listening: socket.socket) -> None:
    """Serve an app until a signal arrives.

    When this function returns or raises KeyboardInterrupt, no thread is using a model.
    """
    # Make glibc return freed blocks of 1 MiB and more to the system. By default, glibc raises this
    # threshold to up to 32 MiB and allocates smaller blocks from heaps. Fragmentation by cached
    # states of many sizes can then waste as much memory as the states use.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
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
        proxy_headers=app.state.has_proxy,
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
