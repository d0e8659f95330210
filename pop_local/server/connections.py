"""HTTP connections with a limit on their number and a time limit for receiving each request."""

import asyncio
import sys
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 60.0  # time limit for receiving a whole request
ACCEPTED_AT_ONCE = 8  # connections that asyncio accepts before it handles the first
_MAX_CONNECTIONS = 512
_SPARE = 32  # file descriptors kept free for new connections and child processes


def max_connections() -> int:
    """Return the maximum number of connections, given the limit on file descriptors."""
    if sys.platform == "win32":
        return _MAX_CONNECTIONS
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    n_used = len(list(Path("/dev/fd").iterdir()))
    return max(1, min(_MAX_CONNECTIONS, allowed - n_used - _SPARE))


class Connection(H11Protocol):
    """An HTTP connection with a time limit for receiving each request.

    At the connection limit, a new connection replaces the one that has been idle longest.
    """

    _deadline: asyncio.TimerHandle | None = None

    @property
    def _is_answered(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.more_body and not cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency:
            others: Any = self.connections - {self}
            waiting = [
                (other._since_s, id(other), other) for other in others if not other._is_answered
            ]
            if waiting:
                min(waiting)[-1]._end()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since_s = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _await_request(self) -> None:
        if self._is_answered:
            self._stop_waiting()
        elif self._deadline is None:
            self._since_s = self.loop.time()
            self._deadline = self.loop.call_later(REQUEST_S, self._end)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        self.connections.discard(self)
        self.transport.abort()
