"""Replies in OpenAI's format, and base classes for other APIs' replies."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pop_local import __version__
from pop_local.engine.chat_messages import TokenLogprob, ToolCall, TurnStats
from pop_local.engine.tools.reader import Piece, calls_of
from pop_local.server.api_errors import ApiError
from pop_local.server.model_pool import ServedModel
from pop_local.server.request_bodies import GenerationBody
from pop_local.server.worker import Task

Json = dict[str, Any]
encoded = json.JSONEncoder(ensure_ascii=False).encode

_COUNTS = (
    *("n_pruned", "n_skipped_exact", "n_full", "n_deep"),
    *("n_refilled", "n_exact", "n_stale", "n_image"),
)
_TIMES = ("ttft_s", "encode_s", "prefill_s", "decode_s")
_FINGERPRINT = f"build-{__version__}"


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer.

    `reason` is OpenAI's finish reason. `stop` is the matched stop string ("" if no string
    matched). `usage`: OpenAI's usage fields. `embedding`: see Chunk. `pieces` and `logprobs`
    contain the whole answer, or are empty at the end of a stream.
    """

    reason: str
    stop: str
    usage: Json
    embedding: tuple[float, ...] = ()
    pieces: Sequence[Piece] = ()
    logprobs: Sequence[TokenLogprob] = ()


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.content for piece in pieces)


def reasoning_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.reasoning for piece in pieces)


def usage(stats: TurnStats, queued_s: float, reason: str | None, ignored: Sequence[str]) -> Json:
    """Return OpenAI's `usage` with an added `pop` field for counters and times (in seconds).

    `pop.reason` explains why the prompt was read in full (null if it was pruned). `pop.reading` is
    null if no rows were prefilled. `pop.is_repeating` is true if the answer was stopped because it
    repeated itself. `pop.ignored` lists JSON schema keywords that were not enforced. In
    /v1/responses, the list also contains tools that were left out of the prompt.
    """
    times = {"queued_s": queued_s} | {name: getattr(stats, name) for name in _TIMES}
    return {
        "prompt_tokens": stats.n_prompt,
        "completion_tokens": stats.n_decoded,
        "total_tokens": stats.n_prompt + stats.n_decoded,
        "prompt_tokens_details": {"cached_tokens": stats.n_cached},
        "pop": {
            **{name: getattr(stats, name) for name in _COUNTS},
            "reading": stats.reading if stats.n_evaluated else None,
            "fit": stats.fit or None,
            "is_repeating": stats.is_repeating,
            "reason": reason,
            "ignored": list(ignored),
            **{name: round(seconds, 6) for name, seconds in times.items()},
        },
    }


def timings(usage: Json) -> Json:
    """Return llama-server's `timings`. Prefill yields the first predicted token."""
    n_cached, pop = usage["prompt_tokens_details"]["cached_tokens"], usage["pop"]
    n_prompt, n_predicted = usage["prompt_tokens"] - n_cached, usage["completion_tokens"]
    figures: Json = {"cache_n": n_cached, "prompt_n": n_prompt, "predicted_n": n_predicted}
    steps = {"prompt": (n_prompt, "prefill_s"), "predicted": (n_predicted - 1, "decode_s")}
    for kind, (n, name) in steps.items():
        figures[f"{kind}_ms"] = pop[name] * 1e3
        figures[f"{kind}_per_token_ms"] = pop[name] * 1e3 / n if n > 0 else 0.0
        figures[f"{kind}_per_second"] = n / pop[name] if n > 0 and pop[name] else 0.0
    return figures


def total(ends: Sequence[AnswerEnd]) -> Json:
    """Sum the numeric usage fields of all answers. Nonnumeric fields come from the last answer."""
    return reduce(_sum, (end.usage for end in ends))


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {key: _sum(value, right[key]) for key, value in left.items()}
    is_number = isinstance(left, int | float) and isinstance(right, int | float)
    return round(left + right, 6) if is_number else right


class Reply:
    """A formatter for OpenAI's text completions, and the base class of all formatters."""

    id_prefix, kind = "cmpl-", "text_completion"
    media_type = "text/event-stream"

    def __init__(self, served: ServedModel, body: GenerationBody | None = None) -> None:
        self._id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = served.name
        options = body.stream_options if body else None
        # With stream_options.include_usage, every chunk has the field `usage`.
        self._no_usage: Json = {"usage": None} if options and options.include_usage else {}

    def comment(self, progress: str) -> bytes:
        """Return a keep-alive comment, which clients ignore (see Job.progress)."""
        return f": {progress or 'working'}\n\n".encode()

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        """Start an answer and return the events that precede its first token."""
        self._index, self._options = index, task.options
        self._wants_logprobs = task.options.n_top_logprobs is not None
        return ()

    def progress(self, read: Mapping[str, int]) -> Json:
        """Return an event with empty text and the prefill progress."""
        [event] = self.pieces(Piece(), ())
        return {**event, "prompt_progress": read}

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterable[Json]:
        return (self._choice({"text": piece.content}, logprobs),)

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        return (self._choice({"text": ""}, (), end.reason),)

    def closing(self, ends: Sequence[AnswerEnd]) -> bytes:
        """Return the bytes that follow a stream's last event."""
        figures = self._object([]) | self._figures(ends)
        return (self.frame(figures) if self._no_usage else b"") + b"data: [DONE]\n\n"

    def whole(self, end: AnswerEnd) -> Json:
        return self._choice({"text": text_of(end.pieces)}, end.logprobs, end.reason)

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Any:
        choices = [choice for whole in wholes for choice in whole["choices"]]
        return wholes[0] | {"choices": choices} | self._figures(ends)

    def _figures(self, ends: Sequence[AnswerEnd]) -> Json:
        usage = total(ends)
        return {"usage": usage, "timings": timings(usage)}

    def failed(self, error: ApiError) -> Json:
        return error.openai_body

    def frame(self, content: Json) -> bytes:
        return f"data: {encoded(content)}\n\n".encode()

    def _choice(
        self,
        content: Json,
        logprobs: Sequence[TokenLogprob] | None = None,
        finish_reason: str | None = None,
    ) -> Json:
        entries = (
            self._logprobs(logprobs) if self._wants_logprobs and logprobs is not None else None
        )
        choice = {"index": self._index, **content, "logprobs": entries}
        return self._object([choice | {"finish_reason": finish_reason}]) | self._no_usage

    def _object(self, choices: list[Json]) -> Json:
        head = {"id": self._id, "object": self.kind, "created": self._created}
        model = {"model": self._model, "system_fingerprint": _FINGERPRINT}
        return head | model | {"choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        # If two tokens have the same text, the more likely token's value is used.
        tops = [
            {_text(choice): choice.logprob for choice in (token, *reversed(token.top))}
            for token in logprobs
        ]
        return {
            "tokens": list(map(_text, logprobs)),
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": tops,
        }


class ChatReply(Reply):
    id_prefix, kind = "chatcmpl-", "chat.completion.chunk"

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        super().begin(index, task)
        return (self._choice({"delta": {"role": "assistant", "content": None}}),)

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterable[Json]:
        delta: Json = {"content": piece.content}
        if piece.call is not None:
            delta = {"tool_calls": [{"index": piece.index, **call_json(piece.call)}]}
        elif piece.reasoning:
            delta = {"reasoning_content": piece.reasoning}
        return (self._choice({"delta": delta}, logprobs),)

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        return (self._choice({"delta": {}}, None, end.reason),)

    def whole(self, end: AnswerEnd) -> Json:
        text, calls = text_of(end.pieces), list(map(call_json, calls_of(end.pieces)))
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning := reasoning_of(end.pieces):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        answer = self._choice({"message": message}, end.logprobs, end.reason)
        return answer | {"object": "chat.completion"}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {"content": [chat_logprob(token) for token in logprobs], "refusal": None}


class OtherApiReply(Reply):
    """A formatter that ends each stream with all fields of a complete answer, except the text."""

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        return (self.whole(end),)

    def closing(self, ends: Sequence[AnswerEnd]) -> bytes:
        return b""

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Any:
        return wholes[0] if len(wholes) == 1 else wholes


class EventReply(OtherApiReply):
    """A formatter whose streams consist of named events."""

    def frame(self, content: Json) -> bytes:
        return f"event: {content['type']}\ndata: {encoded(content)}\n\n".encode()


def arguments_of(text: str) -> Any:
    """Return a call's arguments as an object, or None if the token limit cut them off."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def call_json(call: ToolCall) -> Json:
    """Format all or part of a tool call. Only the first part has an id and a name."""
    function = {"arguments": call.arguments}
    if not call.name:
        return {"function": function}
    return {"id": call.id, "type": "function", "function": {"name": call.name, **function}}


def chat_logprob(token: TokenLogprob) -> Json:
    return _described(token) | {"top_logprobs": list(map(_described, token.top))}


def _described(token: TokenLogprob) -> Json:
    fields = {"id": token.id, "token": _text(token), "logprob": token.logprob}
    return fields | {"bytes": list(token.text)}


def _text(token: TokenLogprob) -> str:
    return token.text.decode(errors="replace")
