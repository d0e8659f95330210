"""Transfer of answers from the worker thread to the event loop."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from pop_base.errors import PopError
from pop_local.engine.chat_messages import Chunk
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.worker import Job, Task
from support.scripted_chat import STATS

END = Chunk("", STATS)
FOREVER_S = 3600.0


def run(check) -> None:
    """Run `check(job)` in an event loop."""

    async def checked() -> None:
        await check(Job(Task(Prompt([1], ()), TurnOptions(), reason="test")))

    asyncio.run(asyncio.wait_for(checked(), timeout=20))


async def put(job: Job, *items: Chunk | Exception) -> None:
    """Add chunks from another thread once the reader waits."""
    for _ in range(3):
        await asyncio.sleep(0)
    for item in items:
        await asyncio.to_thread(job.put, item)


def reading(batches: AsyncIterator[list[Chunk]]) -> asyncio.Task[list[Chunk]]:
    async def read() -> list[Chunk]:
        return await anext(batches)

    return asyncio.create_task(read())


def test_first_chunk_is_immediate_and_rest_is_batched():
    pieces = [Chunk("a"), Chunk("b"), Chunk("c")]

    async def check(job: Job) -> None:
        batches = job.batches(FOREVER_S)
        first = reading(batches)
        await put(job, pieces[0])
        assert await first == pieces[:1]
        rest = reading(batches)
        await put(job, *pieces[1:])
        assert not rest.done()
        await put(job, END)
        assert await rest == [*pieces[1:], END]
        with pytest.raises(StopAsyncIteration):
            await anext(batches)

    run(check)


def test_error_follows_earlier_chunks():
    async def check(job: Job) -> None:
        batches = job.batches(FOREVER_S)
        await put(job, Chunk("a"), PopError("no memory"))
        assert await anext(batches) == [Chunk("a")]
        with pytest.raises(PopError, match="no memory"):
            await anext(batches)

    run(check)
