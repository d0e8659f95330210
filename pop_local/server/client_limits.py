"""Limits on expensive work, in total and for each client."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from anyio import CapacityLimiter

from pop_local.server.api_errors import ApiError


class ClientLimiter:
    """A limiter for concurrent work, with a total limit and a limit per client.

    Each request first waits until its client is below the limit on running requests per client.
    The request then waits until the total number of running requests is below the total limit. A
    client with many waiting requests therefore does not delay other clients.
    """

    def __init__(self, total: float, per_client: int, max_waiting: int) -> None:
        """Create a limiter that allows up to `max_waiting` waiting requests per client."""
        self._per_client, self._max_waiting = per_client, max_waiting
        self._all = CapacityLimiter(total)
        self._shares: WeakValueDictionary[str, CapacityLimiter] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for the client's turn (see `wait`), and end the turn on exit."""
        with ExitStack() as held:
            await self.wait(client, held)
            yield

    async def wait(self, client: str, held: ExitStack) -> None:
        """Wait for the client's turn, which ends when `held` is closed.

        Raises ApiError if too many of the client's requests are waiting.
        """
        share = self._shares.setdefault(client, CapacityLimiter(self._per_client))
        if (n_waiting := share.statistics().tasks_waiting) >= self._max_waiting:
            message = f"this client already has {n_waiting} requests waiting; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        for limiter in (share, self._all):
            turn = object()
            await limiter.acquire_on_behalf_of(turn)
            held.callback(limiter.release_on_behalf_of, turn)
