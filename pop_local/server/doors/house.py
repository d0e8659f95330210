"""The server as its doors see it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from pop_local.server.bodies import Body, Named
from pop_local.server.listing import File
from pop_local.server.models import Models, Served
from pop_local.server.replies import Reply
from pop_local.server.worker import Task

AnyNamed = TypeVar("AnyNamed", bound=Named)
AnyBody = TypeVar("AnyBody", bound=Body)
Made = TypeVar("Made")


class House(Protocol):
    """Bodies within limits, models by name, answers."""

    models: Models

    async def read(self, request: Request, kind: type[AnyNamed]) -> AnyNamed:
        """Return the body, within the limits. Raises ApiError and ValidationError."""

    def file(self, request: Request, name: str | None) -> File:
        """Return the model that answers to a name, which may be another one. Raises ApiError."""

    async def served(self, request: Request, name: str | None) -> Served:
        """Return the model that answers to a name, open until the response is sent.

        Raises ApiError, also once the client has hung up.
        """

    async def answer(
        self,
        request: Request,
        served: Served,
        body: AnyBody,
        make: Callable[[AnyBody], list[Task]],
        reply: Reply,
    ) -> Response:
        """Answer tasks one after the other; others may be answered in between."""

    async def made(
        self, request: Request, served: Served, body: AnyBody, make: Callable[[AnyBody], list[Task]]
    ) -> list[Task]:
        """Make the tasks of a request in a thread, those with grammars one after the other."""

    async def work(self, request: Request, served: Served, work: Callable[[], Made]) -> Made:
        """Do it in a thread, until the client has hung up."""
