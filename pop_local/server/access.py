"""Middleware that enforces the access rules, counts requests, and writes the access log."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pop_base.errors import PopError
from pop_local.server.api_errors import CLIENT_GONE, ApiError, stopping
from pop_local.server.metrics import Metrics
from pop_local.server.page.page_routes import is_public

log = logging.getLogger("pop_local.server")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# "-": a client without an address, such as one that uses a Unix socket.
_ON_THIS_MACHINE = ("127.0.0.1", "::1", "-")
LOCAL_ORIGIN = r"(?:https?|tauri)://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
# Containers reach their host by this name, which DNS cannot rebind: .internal is reserved.
_DOCKER = "host.docker.internal"
_HEALTH = ("/health", "/v1/health")
_PROBES = (*_HEALTH, "/metrics")
_MAX_LOGGED_NAME = 80  # characters


@dataclass(frozen=True)
class AccessRules:
    """Rules that decide which requests the server accepts.

    If `api_keys` is not empty, requests must include one of them. If `api_keys` is empty, requests
    must be addressed to a loopback name or to `host`, the listening address. If `api_keys` is
    empty, a web page on another machine may send requests only if the page's origin (in lowercase)
    is in `origins`. If `shares_cache` is true, prompts may reuse rows cached for other clients.
    """

    api_keys: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()
    shares_cache: bool = False

    def client_of(self, scope: Scope) -> str:
        """Return the client's address or, if API keys are set, a hash of the request's key."""
        if self.api_keys:
            return hashlib.sha256((sent_key(scope, self) or "").encode()).hexdigest()[:16]
        return str(scope["client"][0]) if scope.get("client") else "-"

    def cache_scope(self, client: str) -> str:
        """Return the owner of a client's cached rows ("" if clients and commands share them)."""
        is_only = len(self.api_keys) == 1 or client in _ON_THIS_MACHINE
        return "" if self.shares_cache or is_only else client


def parse_origin(text: str) -> str:
    """Normalize an origin to the form that browsers send. Raises PopError for an invalid origin."""
    origin = text.strip().removesuffix("/").lower()
    if not re.fullmatch(r"[\w+.-]+://[^/*?#\s]+", origin):
        raise PopError(
            f"{text!r} is not a valid web origin",
            "pass the scheme, host, and port (such as https://example.org:8443), or use"
            " --api-key, which allows all origins",
        )
    return origin


@dataclass(frozen=True)
class AccessMiddleware:
    """ASGI middleware that checks, counts, and logs each request.

    The metrics include a counter for each path in `paths`. In the scope's state, `client`
    identifies the client, and `cache_scope` identifies the owner of the client's cached rows.
    `note` is appended to the log line, and `client_gone` marks an aborted stream. The middleware
    closes `held` after the response. If the requested model does not exist, `requested` is its
    name, and `answering` is the name of the model that answers instead.
    """

    app: ASGIApp
    metrics: Metrics
    rules: AccessRules
    paths: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status, is_started = 500, False

        async def send_and_note(message: Message) -> None:
            nonlocal status, is_started
            if message["type"] == "http.response.start":
                status, is_started = message["status"], True
                if "requested" in state and "answering" in state:
                    name = quote(state["answering"], safe=" :+@,()").encode()
                    message["headers"] = [*message["headers"], (b"x-model", name)]
            await send(message)

        state: dict[str, Any] = scope.setdefault("state", {})
        held = state["held"] = ExitStack()
        state["client"] = self.rules.client_of(scope)
        state["cache_scope"] = self.rules.cache_scope(state["client"])
        try:
            error = refusal(scope, self.rules)
            app = self.app if error is None else error.response(scope["path"])
            await app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # the server stopped before the request was complete
            if is_started:
                raise
            await stopping().response(scope["path"])(scope, receive, send_and_note)
        finally:
            held.close()
            status = CLIENT_GONE if state.get("client_gone") else status
            self._record(scope, status, time.perf_counter() - started_s)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.requests.labels(path, str(status)).inc()
        client = scope["client"][0] if scope.get("client") else "-"
        notes = [state["note"]] if "note" in state else []
        if "requested" in state:
            requested = state["requested"][:_MAX_LOGGED_NAME]
            notes.append(f"the requested model {requested!r} does not exist")
        level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
        line = f"{client} {scope['method']} {scope['path']!r} {status}, {seconds:.2f} s"
        log.log(level, "%s", ", ".join([line, *notes]))


def refusal(scope: Scope, rules: AccessRules) -> ApiError | None:
    """Return an error if the rules reject the request, or None if they accept it.

    If no API keys are set, the Host header must name this machine. This check blocks DNS
    rebinding. A request from a web page must have an allowed origin. A server that listens on
    0.0.0.0 accepts any IP address in the Host header, because DNS rebinding requires a host name.
    """
    headers = Headers(scope=scope)
    if "content-length" in headers and "transfer-encoding" in headers:
        error = ApiError(400, "a request cannot include both Content-Length and Transfer-Encoding")
        error.headers = {"Connection": "close"}  # the next request's start is ambiguous
        return error
    if rules.api_keys:
        if sent_key(scope, rules) is not None:
            return None
        if scope["path"] in _HEALTH or is_public(scope):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    requested, origin = headers.get("host", ""), headers.get("origin")
    host, name = rules.host.lower(), _host_name(f"//{requested}")
    try:
        ipaddress.ip_address(name)
        is_any_address = ipaddress.ip_address(host).is_unspecified
    except ValueError:  # the name or the host is not an IP address
        is_any_address = False
    is_docker = name == _DOCKER and host not in LOOPBACK
    if name not in (*LOOPBACK, host) and not is_any_address and not is_docker:
        message = (
            f"requests to the host name {requested!r} are refused; start the server with --api-key"
            " to allow them"
        )
        return ApiError(403, message, code="foreign_host")
    if origin is None or origin.lower() in rules.origins:
        return None
    if _host_name(origin) not in (*LOOPBACK, name):
        message = (
            f"requests from web pages at {origin!r} are refused; start the server with"
            " --cors ORIGIN or --api-key to allow them"
        )
        return ApiError(403, message, code="foreign_origin")
    return None


def sent_key(scope: Scope, rules: AccessRules) -> str | None:
    """Return the request's API key, or None if the key is missing or wrong."""
    headers = Headers(scope=scope)
    _, _, bearer = headers.get("authorization", "").partition(" ")
    for sent in (bearer, headers.get("x-api-key", "")):  # x-api-key: Anthropic's clients
        for key in rules.api_keys:
            if hmac.compare_digest(sent.encode("latin-1"), key.encode()):
                return key
    return None


def _host_name(url: str) -> str:
    """Return a URL's host name, or "" if the URL contains more than a scheme, host, and port."""
    try:
        parts = urlsplit(url)
        is_more = "@" in parts.netloc or parts.netloc != url.partition("//")[2]
        return "" if is_more else parts.hostname or ""
    except ValueError:
        return ""
