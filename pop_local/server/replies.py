"""Replies in OpenAI's format, and the base classes of other APIs' replies."""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

from pop_local.engine.chat_messages import TokenLogprob, ToolCall, TurnStats
from pop_local.engine.tools.reader import Piece, calls_of
from pop_local.server.api_errors import ApiError
from pop_local.server.model_pool import ServedModel
from pop_local.server.worker import Task

Json = dict[str, Any]
encoded = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class AnswerEnd:
    """An answer's finish reason in OpenAI's words, matched stop string ("" for none) and `usage`.

    `embedding`: see Chunk.
    """

    reason: str
    stop: str
    usage: Json
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True)
class CompleteAnswer:
    """A complete answer."""

    end: AnswerEnd
    pieces: Sequence[Piece] = ()
    logprobs: Sequence[TokenLogprob] = ()


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.content for piece in pieces)


def reasoning_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.reasoning for piece in pieces)


def usage(stats: TurnStats, queued_s: float, reason: str | None, ignored: Sequence[str]) -> Json:
    """Return OpenAI's `usage` with our counters as `pop`; times in seconds.

    `pop.reason` is the reason for reading in full (null: pruning is on). `pop.reading` and
    `pop.fit` are those of TurnStats, null if nothing was read. `pop.ignored` lists keywords of the
    JSON schema that were not enforced.
    """
    return {
        "prompt_tokens": stats.n_prompt,
        "completion_tokens": stats.n_decoded,
        "total_tokens": stats.n_prompt + stats.n_decoded,
        "prompt_tokens_details": {"cached_tokens": stats.n_cached},
        "pop": {
            "n_pruned": stats.n_pruned,
            "n_skipped_exact": stats.n_skipped_exact,
            "n_full": stats.n_full,
            "n_deep": stats.n_deep,
            "n_refilled": stats.n_refilled,
            "n_exact": stats.n_exact,
            "n_image": stats.n_image,
            "reading": stats.reading if stats.n_evaluated else None,
            "fit": stats.fit or None,
            "reason": reason,
            "ignored": list(ignored),
            "queued_s": round(queued_s, 6),
            "ttft_s": round(stats.ttft_s, 6),
            "encode_s": round(stats.encode_s, 6),
            "prefill_s": round(stats.prefill_s, 6),
            "decode_s": round(stats.decode_s, 6),
        },
    }


def total(ends: Sequence[AnswerEnd]) -> Json:
    """Return the sums of several answers' numbers, and the last answer's other fields."""
    return reduce(_sum, (end.usage for end in ends))


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: _sum(value, other[key]) for key, value in one.items()}
    is_number = isinstance(one, int | float) and isinstance(other, int | float)
    return round(one + other, 6) if is_number else other


class Reply:
    """A request's answers as OpenAI's text completions, whole or streamed."""

    id_prefix = "cmpl"
    whole_kind = piece_kind = "text_completion"
    media_type = "text/event-stream"

    def __init__(self, served: ServedModel, *, wants_usage: bool = False) -> None:
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = served.name
        # With stream_options.include_usage, every chunk has the field.
        self._no_usage: Json = {"usage": None} if wants_usage else {}

    def comment(self, progress: str) -> bytes:
        """Return a keep-alive that clients ignore; `progress`: see Job."""
        return f": {progress or 'working'}\n\n".encode()

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        """Start an answer; return the events before its first token."""
        self._index = index
        self._wants_logprobs = task.options.n_top_logprobs is not None
        self._n_written = task.n_written  # the next token's offset in the text
        return ()

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterable[Json]:
        """Return the events of a stream for a piece of the answer."""
        return (self._piece({"text": piece.content}, logprobs),)

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        """Return the last events of an answer."""
        return (self._piece({"text": ""}, (), end.reason),)

    def closing(self, ends: Sequence[AnswerEnd]) -> bytes:
        """Return the bytes after the last event of a stream."""
        figures = self._object(self.piece_kind, []) | {"usage": total(ends)}
        return (self.frame(figures) if self._no_usage else b"") + b"data: [DONE]\n\n"

    def whole(self, answer: CompleteAnswer) -> Json:
        """Return a complete answer."""
        text, reason = {"text": text_of(answer.pieces)}, answer.end.reason
        return self._choice(self.whole_kind, text, answer.logprobs, reason)

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Any:
        """Return the response that contains all answers."""
        choices = [choice for whole in wholes for choice in whole["choices"]]
        return wholes[0] | {"choices": choices, "usage": total(ends)}

    def failed(self, error: ApiError) -> Json:
        return error.openai_body

    def frame(self, content: Json) -> bytes:
        """Return the bytes of one event of a stream."""
        return f"data: {encoded(content)}\n\n".encode()

    def _piece(
        self,
        content: Json,
        logprobs: Sequence[TokenLogprob] | None = None,
        finish_reason: str | None = None,
    ) -> Json:
        return self._choice(self.piece_kind, content, logprobs, finish_reason) | self._no_usage

    def _choice(
        self,
        kind: str,
        content: Json,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
    ) -> Json:
        shown = self._logprobs(logprobs) if self._wants_logprobs and logprobs is not None else None
        choice = {
            "index": self._index,
            **content,
            "logprobs": shown,
            "finish_reason": finish_reason,
        }
        return self._object(kind, [choice])

    def _object(self, kind: str, choices: list[Json]) -> Json:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return head | {"choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        texts = [_text(token.text) for token in logprobs]
        starts = list(accumulate(map(len, texts), initial=self._n_written))
        self._n_written = starts.pop()
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [_top(token) for token in logprobs],
            "text_offset": starts,
        }


class ChatReply(Reply):
    id_prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        super().begin(index, task)
        return (self._piece({"delta": {"role": "assistant", "content": ""}}),)

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterable[Json]:
        delta: Json = {"content": piece.content}
        if piece.call is not None:
            delta = {"tool_calls": [{"index": piece.index, **call_json(piece.call)}]}
        elif piece.reasoning:
            delta = {"reasoning_content": piece.reasoning}
        return (self._piece({"delta": delta}, logprobs),)

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        return (self._piece({"delta": {}}, None, end.reason),)

    def whole(self, answer: CompleteAnswer) -> Json:
        text, calls = text_of(answer.pieces), list(map(call_json, calls_of(answer.pieces)))
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning := reasoning_of(answer.pieces):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        reason = answer.end.reason
        return self._choice(self.whole_kind, {"message": message}, answer.logprobs, reason)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {"content": [chat_logprob(token) for token in logprobs], "refusal": None}


class OtherApiReply(Reply):
    """Replies of other APIs: a stream ends with a complete answer without its text."""

    def ending(self, end: AnswerEnd) -> Iterable[Json]:
        return (self.whole(CompleteAnswer(end)),)

    def closing(self, ends: Sequence[AnswerEnd]) -> bytes:
        return b""

    def joined(self, wholes: Sequence[Json], ends: Sequence[AnswerEnd]) -> Any:
        return wholes[0] if len(wholes) == 1 else wholes


class EventReply(OtherApiReply):
    """Replies that are streamed as named events."""

    def frame(self, content: Json) -> bytes:
        return f"event: {content['type']}\ndata: {encoded(content)}\n\n".encode()


def arguments_of(text: str) -> Any:
    """Return a call's arguments as an object; None if the token limit cut them off."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def call_json(call: ToolCall) -> Json:
    """Return a call, or a later part of one, which has no id and no name."""
    function = {"arguments": call.arguments}
    if not call.id:
        return {"function": function}
    return {"id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _top(token: TokenLogprob) -> Json | None:
    """Return log probabilities by text: of the most likely tokens, and of the token itself."""
    if token.logprob is None:
        return None
    # Two tokens may have the same text; the more likely one counts.
    by_text: dict[str, float | None] = {_text(token.text): token.logprob}
    for likely in reversed(token.top):
        by_text[_text(likely.text)] = likely.logprob
    return by_text


def chat_logprob(token: TokenLogprob) -> Json:
    likely = [_described(one.text, one.logprob) for one in token.top]
    return _described(token.text, token.logprob) | {"top_logprobs": likely}


def _described(text: bytes, logprob: float | None) -> Json:
    return {"token": _text(text), "logprob": logprob, "bytes": list(text)}


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
