"""From the chunks of a job to the response, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pop_local.engine.turn import TokenLogprob, TurnStats
from pop_local.server.errors import ApiError, as_api_error, hung_up
from pop_local.server.replies import Ending, Json, Reply, usage
from pop_local.server.worker import STOPPING, Job

# Tokens that come faster than this are sent together, each as an event of its own.
_PAUSE_S = 0.02
# The end of an answer is not waited for that long.
_LONG_PAUSE_S = 1.0
# So that proxies and clients do not take a long prefill for a dead connection.
_PING_S = 10.0
_PING = b": working\n\n"
_DONE = b"data: [DONE]\n\n"
_encoded = json.JSONEncoder(ensure_ascii=False).encode


class Answer:
    """One answer on its way to the client. `reason`: why the prompt is not pruned, or None."""

    def __init__(self, request: Request, job: Job, reply: Reply, reason: str | None) -> None:
        self._state = request.state
        self._job = job
        self._reply = reply
        self._reason = reason

    async def whole(self) -> Response:
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        async for batch in self._job.batches(_LONG_PAUSE_S):
            for chunk in batch:
                text.append(chunk.text)
                logprobs += chunk.logprobs
                if chunk.stats is not None:
                    ending = self._ending(chunk.stats)
        return JSONResponse(self._reply.whole("".join(text), logprobs, ending))

    async def stream(self, wants_usage: bool) -> AsyncIterator[bytes]:
        """Ends with [DONE], or with an error in place of it."""
        nothing_yet: Json = {"usage": None} if wants_usage else {}
        complete = False
        try:
            for event in self._reply.opening():
                yield _event(event | nothing_yet)
            async for batch in self._job.batches(_PAUSE_S, _PING_S):
                pieces = [
                    _event(self._reply.piece(chunk.text, chunk.logprobs) | nothing_yet)
                    for chunk in batch
                    if chunk.text or chunk.logprobs
                ]
                if pieces or not batch:
                    yield b"".join(pieces) or _PING
                if batch and (stats := batch[-1].stats) is not None:
                    ending = self._ending(stats)
            complete = True
            yield _event(self._reply.last(ending.finish_reason) | nothing_yet)
            if wants_usage:
                yield _event(self._reply.figures(ending.usage))
            yield _DONE
        except Exception as error:
            complete = not self._job.cancelled.is_set()
            yield as_api_error(error).event
        finally:
            if not complete:
                self._job.cancelled.set()
                self._state.hung_up = True

    def _ending(self, stats: TurnStats) -> Ending:
        """Raises ApiError when the answer was cut off."""
        cached = f"{stats.n_cached:,} cached, " if stats.n_cached else ""
        self._state.note = (
            f", waited {self._job.queued_s:.2f} s, prompt {stats.n_prompt:,} tokens"
            f" ({cached}{stats.left}), TTFT {stats.ttft_s:.2f} s,"
            f" {stats.n_decoded:,} tokens written"
        )
        if stats.finish_reason == "interrupted":
            if self._job.cancelled.is_set():
                raise hung_up()
            raise ApiError(503, STOPPING)
        return Ending(stats.finish_reason, usage(stats, self._job.queued_s, self._reason))


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {_encoded(content)}\n\n".encode()
