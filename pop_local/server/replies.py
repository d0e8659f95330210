"""What the server answers: OpenAI's objects, and the counters in them."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pop_local.engine.turn import TokenLogprob, TurnStats

Json = dict[str, Any]


def usage(stats: TurnStats, queued_s: float, reason: str | None) -> Json:
    """`pop.reason`: why pruning is off for this request, null when it is on. `pop.reading`: see
    TurnStats, null when nothing was read. Times in seconds.
    """
    return {
        "prompt_tokens": stats.n_prompt,
        "completion_tokens": stats.n_decoded,
        "total_tokens": stats.n_prompt + stats.n_decoded,
        "prompt_tokens_details": {"cached_tokens": stats.n_cached},
        "pop": {
            "n_pruned": stats.n_pruned,
            "n_exact": stats.n_exact,
            "n_full": stats.n_full,
            "reading": stats.reading if stats.n_evaluated else None,
            "reason": reason,
            "queued_s": round(queued_s, 6),
            "ttft_s": round(stats.ttft_s, 6),
            "prefill_s": round(stats.prefill_s, 6),
            "decode_s": round(stats.decode_s, 6),
        },
    }


@dataclass(frozen=True)
class Ending:
    """How an answer ended."""

    finish_reason: str
    usage: Json


class Reply(Protocol):
    """One answer, whole or in pieces."""

    def opening(self) -> Iterator[Json]: ...

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json: ...

    def last(self, finish_reason: str) -> Json: ...

    def figures(self, usage: Json) -> Json: ...

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], ending: Ending) -> Json: ...


@dataclass
class ChatReply:
    """`wants_logprobs` tells an empty list from none asked for."""

    model: str
    wants_logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def opening(self) -> Iterator[Json]:
        yield self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))

    def last(self, finish_reason: str) -> Json:
        return self._chunk({}, finish_reason=finish_reason)

    def figures(self, usage: Json) -> Json:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], ending: Ending) -> Json:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": ending.finish_reason,
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": ending.usage}

    def _chunk(
        self, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self.wants_logprobs:
            return None
        return {"content": [_chat_logprob(token) for token in logprobs], "refusal": None}


@dataclass
class CompletionReply:
    """`n_written`: characters of the text so far, where the next token begins."""

    model: str
    wants_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    n_written: int = 0

    def opening(self) -> Iterator[Json]:
        yield from ()

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._answer(text, logprobs, None)

    def last(self, finish_reason: str) -> Json:
        return self._answer("", (), finish_reason)

    def figures(self, usage: Json) -> Json:
        return self._head() | {"choices": [], "usage": usage}

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], ending: Ending) -> Json:
        return self._answer(text, logprobs, ending.finish_reason) | {"usage": ending.usage}

    def _answer(
        self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None
    ) -> Json:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return self._head() | {"choices": [choice]}

    def _head(self) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self.wants_logprobs:
            return None
        offsets = []
        for token in logprobs:
            offsets.append(self.n_written)
            self.n_written += len(_text(token.text))
        return {
            "tokens": [_text(token.text) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [_top(token) for token in logprobs],
            "text_offset": offsets,
        }


def _top(token: TokenLogprob) -> Json | None:
    """As OpenAI: the likeliest ones, and the token itself where it is none of them."""
    if token.logprob is None:
        return None
    # Two tokens may look alike as text; the likelier one counts.
    by_text = {_text(token.text): token.logprob}
    for likely in reversed(token.top):
        by_text[_text(likely.text)] = likely.logprob
    return by_text


def _chat_logprob(token: TokenLogprob) -> Json:
    likely = [_described(one.text, one.logprob) for one in token.top]
    return _described(token.text, token.logprob) | {"top_logprobs": likely}


def _described(text: bytes, logprob: float | None) -> Json:
    return {"token": _text(text), "logprob": logprob, "bytes": list(text)}


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
