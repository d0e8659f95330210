"""From the chunks of jobs to the response, whole or in pieces, in the form that a Reply gives."""

import time
from collections.abc import AsyncGenerator, Iterable, Sequence

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.tools.form import CallForm
from pop_local.engine.tools.reader import CallReader, Piece
from pop_local.engine.turn import Chunk, TokenLogprob
from pop_local.server.api_errors import ApiError, as_api_error, hung_up
from pop_local.server.replies import AnswerEnd, Json, Reply, usage
from pop_local.server.worker import STOPPING, Job

# Tokens that come faster than this are sent together, each as an event of its own.
_PAUSE_S = 0.02
# A whole answer's end comes sooner than after this.
_LONG_PAUSE_S = 1.0
# So that proxies and clients do not take a long prefill for a dead connection.
_PING_S = 10.0
# How often a stream tells how far its prompt is.
_PROGRESS_S = 0.5


async def whole_answer(state: State, jobs: Iterable[Job], reply: Reply) -> Response:
    wholes: list[Json] = []
    ends: list[AnswerEnd] = []
    for index, job in enumerate(jobs):
        reply.begin(index, job.task)
        chunks = [chunk async for batch in job.batches(_LONG_PAUSE_S) for chunk in batch]
        reading = _Reading(job)
        said = [*await reading.said("".join(chunk.text for chunk in chunks)), *await reading.rest()]
        ends.append(_end(state, job, chunks[-1], has_called=reading.has_called))
        logprobs = [token for chunk in chunks for token in chunk.logprobs]
        wholes.append(reply.whole(said, logprobs, ends[-1]))
    return JSONResponse(reply.joined(wholes, ends))


async def streamed_answer(state: State, jobs: Iterable[Job], reply: Reply) -> AsyncGenerator[bytes]:
    """Yield one job's answer after the other; an error is the last piece, if there is any."""
    ends: list[AnswerEnd] = []
    complete = False
    last = b""

    def framed(pieces: Iterable[Json]) -> bytes:
        return b"".join(map(reply.frame, pieces))

    try:
        for index, job in enumerate(jobs):
            yield last + framed(reply.begin(index, job.task))
            reading = _Reading(job)
            shown, shown_s = "", time.monotonic()
            async for batch in job.batches(_PAUSE_S, _PROGRESS_S):
                if not batch:
                    is_news = job.progress != shown
                    if is_news or time.monotonic() - shown_s >= _PING_S:
                        shown, shown_s = job.progress, time.monotonic()
                        yield reply.comment(shown)
                    continue
                parts = [reply.pieces(*part) for part in await reading.parts(batch)]
                yield b"".join(map(framed, parts))
            rest = [reply.pieces(piece, ()) for piece in await reading.rest()]
            ends.append(_end(state, job, batch[-1], has_called=reading.has_called))
            last = b"".join(map(framed, [*rest, reply.ending(ends[-1])]))
        complete = True
        yield last + reply.closing(ends)
    except Exception as error:
        complete = not job.cancelled.is_set()
        job.cancelled.set()  # nobody reads what may still come
        yield reply.frame(reply.failed(as_api_error(error)))
    finally:
        if not complete:
            job.cancelled.set()
            state.hung_up = True


class _Reading:
    """The pieces of an answer; calls of tools are read in another process, and not in the loop."""

    def __init__(self, job: Job) -> None:
        form = job.task.options.calls
        self._reader = None if form is None else CallReader(form)

    @property
    def has_called(self) -> bool:
        return self._reader is not None and self._reader.n_calls > 0

    async def said(self, text: str) -> list[Piece]:
        if self._reader is None:
            return [Piece(text)] if text else []
        return await run_in_threadpool(self._reader.push, text)

    async def parts(self, batch: Sequence[Chunk]) -> list[tuple[Piece, Sequence[TokenLogprob]]]:
        """Return the pieces of chunks that came together, with their log probabilities."""
        if self._reader is None:
            shown = (chunk for chunk in batch if chunk.text or chunk.logprobs)
            return [(Piece(chunk.text), chunk.logprobs) for chunk in shown]
        said = await self.said("".join(chunk.text for chunk in batch))
        logprobs = [token for chunk in batch for token in chunk.logprobs]
        return [*((piece, ()) for piece in said), *([(Piece(), logprobs)] if logprobs else [])]

    async def rest(self) -> list[Piece]:
        return [] if self._reader is None else await run_in_threadpool(self._reader.end)


def _end(state: State, job: Job, last: Chunk, *, has_called: bool) -> AnswerEnd:
    """Raises ApiError when the answer was cut off."""
    stats = last.stats
    assert stats is not None, "the last chunk has them"
    state.note = (
        f", waited {job.queued_s:.2f} s, prompt {stats.n_prompt:,} tokens"
        f" ({stats.left}), TTFT {stats.ttft_s:.2f} s,"
        f" {stats.n_decoded:,} tokens written"
    )
    if stats.finish_reason == "interrupted":
        if job.cancelled.is_set():
            raise hung_up()
        raise ApiError(503, STOPPING)
    form = job.task.options.calls or job.task.options.grammar
    ignored = form.ignored if isinstance(form, CallForm | Grammar) else ()
    figures = usage(stats, job.queued_s, job.task.reason, ignored)
    reason: str = stats.finish_reason
    reason = "tool_calls" if has_called and reason == "stop" else reason
    return AnswerEnd(reason, stats.stop, figures, last.embedding)
