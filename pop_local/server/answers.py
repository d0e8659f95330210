"""From the chunks of a job to the response, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.turn import TokenLogprob, TurnStats
from pop_local.server.errors import ApiError, as_api_error, hung_up
from pop_local.server.replies import Json, Reply, usage
from pop_local.server.worker import STOPPING, Job

# Tokens that come faster than this are sent together, each as an event of its own.
_PAUSE_S = 0.02
# A whole answer's end comes sooner than after this.
_LONG_PAUSE_S = 1.0
# So that proxies and clients do not take a long prefill for a dead connection.
_PING_S = 10.0
_PING = b": working\n\n"
_DONE = b"data: [DONE]\n\n"
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
    whole = reply.whole("".join(text), logprobs, ended)
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
            pieces = [
                _event(reply.piece(chunk.text, chunk.logprobs) | nothing_yet)
                for chunk in batch
                if chunk.text or chunk.logprobs
            ]
            if pieces or not batch:
                yield b"".join(pieces) or _PING
            if batch and (stats := batch[-1].stats) is not None:
                ended, figures = _ended(state, job, stats)
        complete = True
        yield _event(reply.last(ended) | nothing_yet)
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
    grammar = job.task.options.grammar
    ignored = grammar.ignored if isinstance(grammar, Grammar) else ()
    return stats.finish_reason, usage(stats, job.queued_s, job.task.reason, ignored)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {_encoded(content)}\n\n".encode()
