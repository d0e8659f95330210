"""The middleware that every request passes first: the rule of entry, the count, the log."""

import asyncio
import hmac
import ipaddress
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pop_local.server.api_errors import HUNG_UP, ApiError
from pop_local.server.metrics import Metrics
from pop_local.server.page.page_routes import is_public
from pop_local.server.worker import STOPPING

log = logging.getLogger("pop_local.server")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LOCAL_ORIGIN = r"(?:https?|tauri)://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
# How containers call the machine that they run on; nobody can register a name that ends so.
_DOCKER = "host.docker.internal"
_HEALTH = ("/health", "/v1/health")
_PROBES = (*_HEALTH, "/metrics")
# Characters of the name that a client asks for, in the log.
_SHOWN = 80


@dataclass(frozen=True)
class AccessRules:
    """Who is let in: those with the key, "" for none. Without one only this machine's names count,
    and `host`, the address that is listened on.

    `origins`: of web pages that may ask, beside those of this machine; in small letters.
    """

    api_key: str = ""
    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()


class AccessMiddleware:
    """ASGI middleware. The scope's state may say `hung_up`, and a `note` for the log.

    Where the state has a name as `asked`, the client asked for a model that is not here, and
    `answering` names the other one. The state's `held` is closed at the end. `paths`: those that
    are counted each for itself.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, entry: AccessRules, paths: frozenset[str]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._entry = entry
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status, is_started = 500, False

        async def watched_send(message: Message) -> None:
            nonlocal status, is_started
            if message["type"] == "http.response.start":
                status, is_started = message["status"], True
                if "asked" in state and "answering" in state:
                    name = quote(state["answering"], safe=" :+@,()").encode()
                    message["headers"] = [*message["headers"], (b"x-model", name)]
            await send(message)

        state: dict[str, Any] = scope.setdefault("state", {})
        held = state["held"] = ExitStack()
        try:
            error = refusal(scope, self._entry)
            app = self._app if error is None else error.response(scope["path"])
            await app(scope, receive, watched_send)
        except asyncio.CancelledError:  # the server ends, and the rest of a request never came
            if is_started:
                raise
            stopping = ApiError(503, STOPPING).response(scope["path"])
            await stopping(scope, receive, watched_send)
        finally:
            held.close()
            status = HUNG_UP if state.get("hung_up") else status
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            client = scope["client"][0] if scope.get("client") else "-"
            took = f"{time.perf_counter() - started_s:.2f} s{state.get('note', '')}"
            if "asked" in state:
                took += f", asked for {state['asked'][:_SHOWN]!r}, which is not here"
            level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
            log.log(level, "%s %s %r %d, %s", client, scope["method"], scope["path"], status, took)


def refusal(scope: Scope, entry: AccessRules) -> ApiError | None:
    """Return why a request's sender is refused, if so.

    Without a key, web pages of other origins are kept out, and those whose name was made to lead
    here. An address cannot be made to lead elsewhere, so with 0.0.0.0 all addresses may be asked.
    """
    headers = Headers(scope=scope)
    if entry.api_key:
        _, _, bearer = headers.get("authorization", "").partition(" ")
        wanted = entry.api_key.encode()
        for given in (bearer, headers.get("x-api-key", "")):  # as Anthropic's clients send it
            if hmac.compare_digest(given.encode("latin-1"), wanted):
                return None
        if scope["path"] in _HEALTH or is_public(scope):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    asked, origin, host = headers.get("host", ""), headers.get("origin"), entry.host.lower()
    name = _host_name(f"//{asked}")
    address, own = _address(name), _address(host)
    is_any_address = address is not None and own is not None and own.is_unspecified
    is_docker = name == _DOCKER and host not in LOOPBACK
    if name not in (*LOOPBACK, host) and not is_any_address and not is_docker:
        return _refused(f"requests to the host name {asked!r}", "--api-key", "foreign_host")
    if origin is None or origin.lower() in entry.origins:
        return None
    if _host_name(origin) not in (*LOOPBACK, name):
        allowing = "--cors ORIGIN, or --api-key,"
        return _refused(f"requests of web pages of {origin!r}", allowing, "foreign_origin")
    return None


def _refused(what: str, allowing: str, code: str) -> ApiError:
    words = f"{what} are refused; start the server with {allowing} to allow them"
    return ApiError(403, words, code=code)


def _host_name(url: str) -> str:
    """Return the name without port or brackets; "" unless scheme, name and port are all."""
    try:
        parts = urlsplit(url)
        is_more = "@" in parts.netloc or parts.netloc != url.partition("//")[2]
        return "" if is_more else parts.hostname or ""
    except ValueError:
        return ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
