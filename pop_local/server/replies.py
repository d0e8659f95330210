"""The server's answers: OpenAI's objects, and the counters in them."""

import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pop_local.engine.tools.form import CallForm
from pop_local.engine.tools.reader import CallReader, Piece, calls_of
from pop_local.engine.turn import Chunk, TokenLogprob, ToolCall, TurnStats

Json = dict[str, Any]


def usage(stats: TurnStats, queued_s: float, reason: str | None, ignored: Sequence[str]) -> Json:
    """Return the counters; times in seconds.

    `pop.reason`: why pruning is off for this request, null when it is on. `pop.reading`: see
    TurnStats, null when nothing was read. `pop.fit`: see there. `pop.ignored`: keywords of
    the JSON schema that were not enforced.
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
            "n_selected": stats.n_selected,
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


class Reply:
    """One answer, whole or in pieces. `wants_logprobs` tells an empty list from none asked for.

    `n_written`: characters of the text so far, where the next token begins.
    """

    id_prefix = "cmpl"
    whole_kind = piece_kind = "text_completion"

    def __init__(self, model: str, wants_logprobs: bool, n_written: int) -> None:
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._wants_logprobs = wants_logprobs
        self._n_written = n_written

    def opening(self) -> tuple[Json, ...]:
        return ()

    def pieces(self, batch: Sequence[Chunk]) -> list[Json]:
        return [
            self.piece(each.text, each.logprobs) for each in batch if each.text or each.logprobs
        ]

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._said(self.piece_kind, {"text": text}, logprobs)

    def ending(self, finish_reason: str) -> list[Json]:
        return [self.last(finish_reason)]

    def last(self, finish_reason: str) -> Json:
        return self._said(self.piece_kind, {"text": ""}, (), finish_reason)

    def figures(self, usage: Json) -> Json:
        return self._object(self.piece_kind, []) | {"usage": usage}

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str) -> Json:
        return self._said(self.whole_kind, {"text": text}, logprobs, finish_reason)

    def _said(
        self,
        kind: str,
        said: Json,
        logprobs: Sequence[TokenLogprob] | None = None,
        finish_reason: str | None = None,
    ) -> Json:
        shown = self._logprobs(logprobs) if self._wants_logprobs and logprobs is not None else None
        choice = {"index": 0, **said, "logprobs": shown, "finish_reason": finish_reason}
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

    def opening(self) -> tuple[Json, ...]:
        return (self._said(self.piece_kind, {"delta": {"role": "assistant", "content": ""}}),)

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._said(self.piece_kind, {"delta": {"content": text}}, logprobs)

    def last(self, finish_reason: str) -> Json:
        return self._said(self.piece_kind, {"delta": {}}, None, finish_reason)

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text}
        return self._said(self.whole_kind, {"message": message}, logprobs, finish_reason)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {"content": [_chat_logprob(token) for token in logprobs], "refusal": None}


class ToolReply(ChatReply):
    """An answer that may call tools. Its calls are read in a child process: not in the loop."""

    def __init__(self, model: str, wants_logprobs: bool, form: CallForm) -> None:
        super().__init__(model, wants_logprobs, 0)
        self._reader = CallReader(form)

    def pieces(self, batch: Sequence[Chunk]) -> list[Json]:
        said = self._reader.push("".join(chunk.text for chunk in batch))
        logprobs = [token for chunk in batch for token in chunk.logprobs]
        events = [self._said(self.piece_kind, {"delta": _delta(piece)}, ()) for piece in said]
        if logprobs and self._wants_logprobs:
            events.append(self._said(self.piece_kind, {"delta": {}}, logprobs))
        return events

    def ending(self, finish_reason: str) -> list[Json]:
        said = self._reader.end()
        events = [self._said(self.piece_kind, {"delta": _delta(piece)}, ()) for piece in said]
        return [*events, self.last(self._reason(finish_reason))]

    def whole(self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str) -> Json:
        said = [*self._reader.push(text), *self._reader.end()]
        message: Json = {"role": "assistant"}
        content = "".join(piece.content for piece in said)
        message["content"] = content if content or not self._reader.n_calls else None
        if reasoning := "".join(piece.reasoning for piece in said):
            message["reasoning_content"] = reasoning
        if calls := calls_of(said):
            message["tool_calls"] = [_call(call) for call in calls]
        reason = self._reason(finish_reason)
        return self._said(self.whole_kind, {"message": message}, logprobs, reason)

    def _reason(self, finish_reason: str) -> str:
        return "tool_calls" if self._reader.n_calls and finish_reason == "stop" else finish_reason


def _delta(piece: Piece) -> Json:
    if piece.call is None:
        said = {"content": piece.content, "reasoning_content": piece.reasoning}
        return {name: text for name, text in said.items() if text}
    return {"tool_calls": [{"index": piece.index, **_call(piece.call)}]}


def _call(call: ToolCall) -> Json:
    """A call, or a later part of it, which is without id and name."""
    function = {"arguments": call.arguments}
    if not call.id:
        return {"function": function}
    return {"id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _top(token: TokenLogprob) -> Json | None:
    """Return the likeliest tokens, and the token itself where it is none of them."""
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
