"""Startup of a server: the listening socket, the models of a folder, the log."""

import errno
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_local.server import app
from pop_local.server.access import AccessRules
from pop_local.server.model_listing import find
from pop_local.server.model_pool import ModelPool, ModelRegistry

_BIND_HINTS = {
    errno.EADDRINUSE: "another program uses this port; try --port 0 for any free one",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 for all networks",
    errno.EACCES: "low ports are reserved; try --port 8080",
}


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket (port 0: any free one). Raises PopError.

    Bind before opening a model, so that a port in use is reported at once.
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
    if sys.platform != "win32":  # Windows would let two servers share a port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> PopError:
    hint = _BIND_HINTS.get(error.errno or 0, "try --port 0 for any free one")
    return PopError(f"cannot listen on {host} port {port}: {error.strerror}", hint)


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def folder_pool(folder: Path, registry: ModelRegistry, model: str, **options: Any) -> ModelPool:
    """Create a pool of a folder's models with `model` open ("": none); `options`: see ModelPool.

    Raises PopError.
    """
    files = registry.files()
    file = find(model, files) if model else None
    if model and file is None:
        hint = nearest_hint(model, {name: name for name in files}, "see `pop-local list`")
        raise PopError(f"{folder} has no model {model!r}", hint)
    pool = ModelPool(registry, default=file.name if file else "", **options)
    if file:
        pool.load(file)
    else:
        pool.check()
    return pool


def serve_models(
    pool: ModelPool,
    listening: socket.socket,
    rules: AccessRules,
    *,
    strict_model: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve models until a signal, then close the pool and the socket.

    `on_ready` is called with the server's URL once clients can connect. Raises PopError.
    """
    try:
        application = app.create_app(pool, rules, strict_model=strict_model)
        try:
            listening.listen(128)
        except OSError as error:  # another program was faster
            host, port = listening.getsockname()[:2]
            raise _cannot_listen(host, port, error) from error
        on_ready(url_of(listening))
        app.run_app(application, listening)
    finally:
        listening.close()
        pool.close()


def log_to_stderr() -> None:
    log = logging.getLogger("pop_local.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
