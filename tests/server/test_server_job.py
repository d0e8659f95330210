"""How an answer gets from the model's thread to whoever reads it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from pop_converter.base.errors import PopError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn import Chunk, TurnOptions
from pop_local.server.worker import Job, Task
from support.scripted import STATS

END = Chunk("", STATS)
FOREVER_S = 3600.0


def run(check) -> None:
    """`check(job)` in an event loop."""

    async def checked() -> None:
        await check(Job(Task(Prompt([1], ()), TurnOptions(), Mode.OFF)))

    asyncio.run(asyncio.wait_for(checked(), timeout=20))


async def put(job: Job, *items: Chunk | Exception) -> None:
    """From another thread, as the model's does it, after the reader has begun to wait."""
    for _ in range(3):
        await asyncio.sleep(0)
    for item in items:
        await asyncio.to_thread(job.put, item)


def reading(batches: AsyncIterator[list[Chunk]]) -> asyncio.Task[list[Chunk]]:
    async def read() -> list[Chunk]:
        return await anext(batches)

    return asyncio.create_task(read())


def test_the_first_piece_is_read_at_once_and_what_comes_fast_with_the_end():
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


def test_what_came_in_a_pause_is_read_after_it_and_later_pieces_at_once():
    async def check(job: Job) -> None:
        batches = job.batches(0.05)
        await put(job, Chunk("a"))
        assert await anext(batches) == [Chunk("a")]
        after = reading(batches)
        await put(job, Chunk("b"))
        assert await after == [Chunk("b")]
        later = reading(batches)
        await asyncio.sleep(0.1)
        await put(job, Chunk("c"))
        assert await later == [Chunk("c")]

    run(check)


def test_nothing_for_a_while_is_an_empty_batch():
    async def check(job: Job) -> None:
        assert await anext(job.batches(FOREVER_S, idle_s=0.01)) == []

    run(check)


def test_an_error_comes_after_the_pieces_before_it():
    async def check(job: Job) -> None:
        batches = job.batches(FOREVER_S)
        await put(job, Chunk("a"), PopError("no memory"))
        assert await anext(batches) == [Chunk("a")]
        with pytest.raises(PopError, match="no memory"):
            await anext(batches)

    run(check)


def test_a_job_that_waits_ends_when_it_is_cancelled():
    async def check(job: Job) -> None:
        batch = reading(job.batches(FOREVER_S))
        await put(job)
        job.cancel()
        with pytest.raises(Exception, match="disconnected"):
            await batch

    run(check)
