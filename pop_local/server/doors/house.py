"""The server as its doors see it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from pop_local.engine.model import PopModel
from pop_local.server.bodies import Body, Named
from pop_local.server.replies import Reply
from pop_local.server.tasks import Tasks
from pop_local.server.worker import Task

AnyNamed = TypeVar("AnyNamed", bound=Named)
AnyBody = TypeVar("AnyBody", bound=Body)
Made = TypeVar("Made")


class House(Protocol):
    """One model, by its name in the API."""

    model: PopModel
    name: str
    tasks: Tasks

    async def read(self, request: Request, kind: type[AnyNamed]) -> AnyNamed:
        """Return the body, within the limits. Raises ApiError and ValidationError."""

    async def answer(
        self, request: Request, body: AnyBody, make: Callable[[AnyBody], list[Task]], reply: Reply
    ) -> Response:
        """Answer tasks one after the other; others may be answered in between."""

    async def made(
        self, request: Request, body: AnyBody, make: Callable[[AnyBody], list[Task]]
    ) -> list[Task]:
        """Make the tasks of a request in a thread, those with grammars one after the other."""

    async def work(self, request: Request, work: Callable[[], Made]) -> Made:
        """Do it in a thread, until the client has hung up."""
