"""What every request passes first: the rule of entry, the count, the log."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pop_local.server.entry import refusal
from pop_local.server.errors import HUNG_UP
from pop_local.server.metrics import Metrics

log = logging.getLogger("pop_local.server")

_PROBES = ("/health", "/metrics")
# Others share one label, however many are tried.
_PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")


class Front:
    """ASGI middleware. The scope's state may say `hung_up`, and a `note` for the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str, host: str) -> None:
        self._app = app
        self._metrics = metrics
        self._entry = (api_key, host)

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
            error = refusal(scope, *self._entry)
            app = self._app if error is None else error.response
            await app(scope, receive, watched_send)
        finally:
            status = HUNG_UP if state.get("hung_up") else status
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            client = scope["client"][0] if scope.get("client") else "-"
            took = f"{time.perf_counter() - started_s:.2f} s{state.get('note', '')}"
            level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
            log.log(level, "%s %s %r %d, %s", client, scope["method"], scope["path"], status, took)
