"""From the chunks of a job to the response, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.tools.form import CallForm
from pop_local.engine.turn import TokenLogprob, TurnStats
from pop_local.server.errors import ApiError, as_api_error, hung_up
from pop_local.server.replies import Json, Reply, ToolReply, usage
from pop_local.server.worker import STOPPING, Job

# Tokens that come faster than this are sent together, each as an event of its own.
_PAUSE_S = 0.02
# A whole answer's end comes sooner than after this.
_LONG_PAUSE_S = 1.0
# So that proxies and clients do not take a long prefill for a dead connection.
_PING_S = 10.0
_PING = b": working\n\n"
_DONE = b"data: [DONE]\n\n"
Made = TypeVar("Made")
_encoded = json.JSONEncoder(ensure_ascii=False).encode


async def whole_answer(state: State, job: Job, reply: Reply) -> Response:
    text: list[str] = []
    logprobs: list[TokenLogprob] = []
    async for batch in job.batches(_LONG_PAUSE_S):
        for chunk in batch:
            text.append(chunk.text)
            logprobs += chunk.logprobs
            if chunk.stats is not None:
                ended, figures = _ended(state, job, chunk.stats)
    whole = await _made(reply, partial(reply.whole, "".join(text), logprobs, ended))
    return JSONResponse(whole | {"usage": figures})


async def streamed_answer(
    state: State, job: Job, reply: Reply, *, wants_usage: bool
) -> AsyncIterator[bytes]:
    """Yield events; the last is [DONE] or an error."""
    nothing_yet: Json = {"usage": None} if wants_usage else {}
    complete = False
    try:
        for event in reply.opening():
            yield _event(event | nothing_yet)
        async for batch in job.batches(_PAUSE_S, _PING_S):
            made = await _made(reply, partial(reply.pieces, batch))
            pieces = [_event(piece | nothing_yet) for piece in made]
            if pieces or not batch:
                yield b"".join(pieces) or _PING
            if batch and (stats := batch[-1].stats) is not None:
                ended, figures = _ended(state, job, stats)
        complete = True
        for event in await _made(reply, partial(reply.ending, ended)):
            yield _event(event | nothing_yet)
        if wants_usage:
            yield _event(reply.figures(figures))
        yield _DONE
    except Exception as error:
        complete = not job.cancelled.is_set()
        job.cancelled.set()  # nobody reads what may still come
        yield _event(as_api_error(error).body)
    finally:
        if not complete:
            job.cancelled.set()
            state.hung_up = True


async def _made(reply: Reply, make: Callable[[], Made]) -> Made:
    """Calls of tools are read in another process."""
    return await run_in_threadpool(make) if isinstance(reply, ToolReply) else make()


def _ended(state: State, job: Job, stats: TurnStats) -> tuple[str, Json]:
    """Return the finish reason and the usage. Raises ApiError when the answer was cut off."""
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
    ignored = form.ignored if isinstance(form, (CallForm, Grammar)) else ()
    return stats.finish_reason, usage(stats, job.queued_s, job.task.reason, ignored)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {_encoded(content)}\n\n".encode()
