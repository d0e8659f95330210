"""From the chunks of jobs to the response, whole or in pieces, in the form that a Reply gives."""

from collections.abc import AsyncGenerator, Iterable

from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.turn import TokenLogprob, TurnStats
from pop_local.server.errors import ApiError, as_api_error, hung_up
from pop_local.server.replies import End, Json, Reply, usage
from pop_local.server.worker import STOPPING, Job

# Tokens that come faster than this are sent together, each as an event of its own.
_PAUSE_S = 0.02
# A whole answer's end comes sooner than after this.
_LONG_PAUSE_S = 1.0
# So that proxies and clients do not take a long prefill for a dead connection.
_PING_S = 10.0


async def whole_answer(state: State, jobs: Iterable[Job], reply: Reply) -> Response:
    wholes: list[Json] = []
    ends: list[End] = []
    for index, job in enumerate(jobs):
        reply.begin(index, job.task)
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        async for batch in job.batches(_LONG_PAUSE_S):
            for chunk in batch:
                text.append(chunk.text)
                logprobs += chunk.logprobs
                if chunk.stats is not None:
                    ends.append(_end(state, job, chunk.stats))
        wholes.append(reply.whole("".join(text), logprobs, ends[-1]))
    return JSONResponse(reply.joined(wholes, ends))


async def streamed_answer(state: State, jobs: Iterable[Job], reply: Reply) -> AsyncGenerator[bytes]:
    """Yield one job's answer after the other; an error is the last piece, if there is any."""
    ends: list[End] = []
    complete = False
    last = b""
    try:
        for index, job in enumerate(jobs):
            yield last + b"".join(map(reply.frame, reply.begin(index, job.task)))
            async for batch in job.batches(_PAUSE_S, _PING_S):
                pieces = [
                    reply.frame(reply.piece(chunk.text, chunk.logprobs))
                    for chunk in batch
                    if chunk.text or chunk.logprobs
                ]
                if pieces or not batch:
                    yield b"".join(pieces) or reply.ping
                if batch and (stats := batch[-1].stats) is not None:
                    ends.append(_end(state, job, stats))
            last = reply.frame(reply.last(ends[-1]))
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


def _end(state: State, job: Job, stats: TurnStats) -> End:
    """Raises ApiError when the answer was cut off."""
    state.note = (
        f", waited {job.queued_s:.2f} s, prompt {stats.n_prompt:,} tokens"
        f" ({stats.left}), TTFT {stats.ttft_s:.2f} s,"
        f" {stats.n_decoded:,} tokens written"
    )
    if stats.finish_reason == "interrupted":
        if job.cancelled.is_set():
            raise hung_up()
        raise ApiError(503, STOPPING)
    grammar = job.task.options.grammar
    ignored = grammar.ignored if isinstance(grammar, Grammar) else ()
    figures = usage(stats, job.queued_s, job.task.reason, ignored)
    return End(stats.finish_reason, stats.stop, figures)
