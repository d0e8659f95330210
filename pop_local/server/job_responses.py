"""Create HTTP responses from jobs' chunks, either as one JSON object or as a stream."""

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from pop_local.engine.chat_messages import Chunk, TokenLogprob
from pop_local.engine.tools.reader import CallReader, Piece
from pop_local.server.api_errors import as_api_error, client_gone, stopping
from pop_local.server.replies import AnswerEnd, Json, Reply, usage
from pop_local.server.worker import Job

# Tokens that arrive within this time are sent in one write, each as a separate event.
_PAUSE_S = 0.02
# Pause between two reads of a complete answer's chunks. Only the answer's end interrupts it.
_LONG_PAUSE_S = 1.0
# Interval of keep-alive comments: proxies and clients drop idle connections.
_PING_S = 10.0
# Interval of progress comments in streams.
_PROGRESS_S = 0.5

# A part of an answer with its log probabilities.
ParsedPiece = tuple[Piece, Sequence[TokenLogprob]]


async def whole_answer(state: State, jobs: Iterable[Job], reply: Reply) -> Response:
    wholes: list[Json] = []
    ends: list[AnswerEnd] = []
    for index, job in enumerate(jobs):
        reply.begin(index, job.task)
        chunks = [chunk async for batch in job.batches(_LONG_PAUSE_S) for chunk in batch]
        parser = _AnswerParser(job)
        parsed = [*await parser.parse(chunks), *await parser.finish()]
        pieces = [piece for piece, _ in parsed]
        logprobs = [token for _, tokens in parsed for token in tokens]
        end = parser.end(state, job, chunks[-1])
        ends.append(replace(end, pieces=pieces, logprobs=logprobs))
        wholes.append(reply.whole(ends[-1]))
    return JSONResponse(reply.joined(wholes, ends))


async def streamed_answer(state: State, jobs: Iterable[Job], reply: Reply) -> AsyncGenerator[bytes]:
    """Yield the jobs' answers in order. If an error occurs, yield it as the last event."""
    ends: list[AnswerEnd] = []
    complete = False
    last = b""

    def framed(parsed: Iterable[ParsedPiece]) -> bytes:
        events = [event for arguments in parsed for event in reply.pieces(*arguments)]
        return b"".join(map(reply.frame, events))

    try:
        for index, job in enumerate(jobs):
            yield last + b"".join(map(reply.frame, reply.begin(index, job.task)))
            parser = _AnswerParser(job)
            progress, shown_s = "", time.monotonic()
            async for batch in job.batches(_PAUSE_S, _PROGRESS_S):
                if batch:
                    read = [reply.progress(chunk.progress) for chunk in batch if chunk.progress]
                    yield b"".join(map(reply.frame, read)) + framed(await parser.parse(batch))
                elif job.progress != progress or time.monotonic() - shown_s >= _PING_S:
                    progress, shown_s = job.progress, time.monotonic()
                    yield reply.comment(progress)
            last = framed(await parser.finish())
            ends.append(parser.end(state, job, batch[-1]))
            last += b"".join(map(reply.frame, reply.ending(ends[-1])))
        complete = True
        yield last + reply.closing(ends)
    except Exception as error:
        complete = not job.cancelled.is_set()
        job.cancelled.set()  # the rest of the answer will not be read
        yield reply.frame(reply.failed(as_api_error(error)))
    finally:
        if not complete:
            job.cancelled.set()
            state.client_gone = True


class _AnswerParser:
    """A parser that splits an answer into text, reasoning, and tool calls.

    A child process parses the tool calls so that parsing never blocks the event loop.
    """

    def __init__(self, job: Job) -> None:
        form = job.task.options.calls
        self._reader = None if form is None else CallReader(form)

    async def parse(self, batch: Sequence[Chunk]) -> list[ParsedPiece]:
        if self._reader is None:
            visible = (chunk for chunk in batch if chunk.text or chunk.logprobs)
            return [(Piece(chunk.text), chunk.logprobs) for chunk in visible]
        text = "".join(chunk.text for chunk in batch)
        logprobs = [token for chunk in batch for token in chunk.logprobs]
        pieces = await run_in_threadpool(self._reader.push, text)
        return [*((piece, ()) for piece in pieces), *([(Piece(), logprobs)] if logprobs else [])]

    async def finish(self) -> list[ParsedPiece]:
        rest = [] if self._reader is None else await run_in_threadpool(self._reader.end)
        return [(piece, ()) for piece in rest]

    def end(self, state: State, job: Job, last: Chunk) -> AnswerEnd:
        """Return the answer's finish reason and usage, and set the access log's note.

        Raises ApiError if the answer was interrupted.
        """
        stats = last.stats
        assert stats is not None
        state.note = (
            f"queued for {job.queued_s:.2f} s, {stats.n_prompt:,} prompt tokens"
            f" ({stats.left}), TTFT {stats.ttft_s:.2f} s,"
            f" {stats.n_decoded:,} tokens generated"
        )
        if self._reader is not None and self._reader.no_call:
            state.note = f"{state.note}, no tool call: {self._reader.no_call}"
        if stats.finish_reason == "interrupted":
            raise client_gone() if job.cancelled.is_set() else stopping()
        form = job.task.options.calls or job.task.options.grammar
        figures = usage(stats, job.queued_s, job.task.reason, getattr(form, "ignored", ()))
        figures["pop"]["job"] = job.id  # identifies the answer in /slots
        reason: str = stats.finish_reason
        if reason == "stop" and self._reader is not None and self._reader.n_calls:
            reason = "tool_calls"
        return AnswerEnd(reason, stats.stop, figures, last.embedding)
