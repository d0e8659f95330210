"""Limits on expensive work, shared fairly among clients."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pop_local.server.api_errors import ApiError


class ClientLimiter:
    """A limiter of concurrent work, in total and for each client.

    Waiting clients take turns, so a client with many requests does not delay the other clients. The
    class must be used in one event loop.
    """

    def __init__(self, total: int, per_client: int, max_waiting: int) -> None:
        """`max_waiting`: the maximum number of a client's waiting requests."""
        self._total, self._per_client, self._max_waiting = total, per_client, max_waiting
        self._running: Counter[str] = Counter()
        # The client whose turn comes first is listed first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for the client's turn, and hold it until exit.

        Raises ApiError if too many of the client's requests are waiting.
        """
        places = self._waiting.setdefault(client, deque())
        if len(places) >= self._max_waiting:
            message = f"{len(places)} of this client's requests are waiting; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        place = asyncio.get_running_loop().create_future()
        places.append(place)
        self._admit()
        try:
            await place
            yield
        finally:
            if place.cancelled():
                places.remove(place)
            else:
                self._running[client] -= 1
                self._waiting[client] = self._waiting.pop(client)  # other clients go first
            self._admit()

    def _admit(self) -> None:
        """Admit the next waiting request, if the limits allow one more."""
        for client, places in list(self._waiting.items()):
            if self._running.total() >= self._total:
                return
            place = next((each for each in places if not each.done()), None)
            if place is not None and self._running[client] < self._per_client:
                self._running[client] += 1
                place.set_result(None)
                places.remove(place)
                self._waiting[client] = self._waiting.pop(client)
            elif not places and not self._running[client]:
                del self._waiting[client], self._running[client]
