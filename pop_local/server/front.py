"""What every request passes first: the key, the count, the log."""

import hmac
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pop_local.server.errors import HUNG_UP, ApiError
from pop_local.server.metrics import Metrics

log = logging.getLogger("pop_local.server")

_PROBES = ("/health", "/metrics")
_PUBLIC = ("/health",)
# Others share one label, however many are tried.
_PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")


class Front:
    """ASGI middleware. The scope's state may say `hung_up`, and a `note` for the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str) -> None:
        self._app = app
        self._metrics = metrics
        self._expected = f"Bearer {api_key}".encode() if api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state: dict[str, Any] = scope.setdefault("state", {})
        try:
            if self._may_enter(scope):
                await self._app(scope, receive, watched_send)
            else:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error.response(scope, receive, watched_send)
        finally:
            status = HUNG_UP if state.get("hung_up") else status
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.requested(path, status)
            client = scope["client"][0] if scope.get("client") else "-"
            took = f"{time.perf_counter() - started_s:.2f} s{state.get('note', '')}"
            level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
            log.log(level, "%s %s %r %d, %s", client, scope["method"], scope["path"], status, took)

    def _may_enter(self, scope: Scope) -> bool:
        if not self._expected or scope["path"] in _PUBLIC:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
