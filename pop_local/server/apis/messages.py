"""Anthropic's Messages API."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import TokenLogprob, ToolCall
from pop_local.engine.tools.reader import Piece
from pop_local.server import replies
from pop_local.server import request_bodies as bodies
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import Json
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Task

# Fields that have the same name in ChatBody, which validates them.
_SAME = {"model", "max_tokens", "stream", "pop", *SAMPLER_OPTIONS}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Base64Source(bodies.LenientBody):
    type: Literal["base64"]
    media_type: str
    data: str


class ImageBlock(bodies.LenientBody):
    type: Literal["image"]
    source: Base64Source


class TextSource(bodies.LenientBody):
    type: Literal["text"]
    data: str


class DocumentBlock(bodies.LenientBody):
    """A document sent as plain text. PDFs are refused."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None

    @property
    def text(self) -> str:
        return f"{self.title}\n\n{self.source.data}" if self.title else self.source.data


_Shown = bodies.TextPart | ImageBlock | DocumentBlock


class ToolUseBlock(bodies.LenientBody):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingBlock(bodies.LenientBody):
    type: Literal["thinking", "redacted_thinking"]


def _blocks(kind: Any) -> Any:
    return Annotated[
        list[Annotated[kind, Field(discriminator="type")]],
        Field(fail_fast=True, max_length=bodies.MAX_PARTS),
        bodies.wrap_text(lambda text: {"type": "text", "text": text}),
        bodies.replace(None, []),
    ]


class ToolResultBlock(bodies.LenientBody):
    type: Literal["tool_result"]
    tool_use_id: str
    content: _blocks(_Shown) = Field(default_factory=list)  # type: ignore[valid-type]


class AnthropicMessage(bodies.LenientBody):
    role: Literal["user", "assistant", "system"]
    content: _blocks(_Shown | ToolUseBlock | ToolResultBlock | ThinkingBlock)  # type: ignore[valid-type]

    def chat_messages(self) -> Iterator[Json]:
        """Yield equivalent messages in the chat format. Tool results precede the user's text."""
        content: list[Json] = []
        calls: list[Json] = []
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                parts = list(map(_part, block.content))
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": parts}
            elif isinstance(block, ToolUseBlock):
                call = ToolCall(block.id, block.name, replies.encoded(block.input))
                calls.append(replies.call_json(call))
            elif not isinstance(block, ThinkingBlock):
                content.append(_part(block))
        if content or calls or not self.content:
            yield {"role": self.role, "content": content} | ({"tool_calls": calls} if calls else {})


class AnthropicTool(bodies.FunctionSpec):
    type: Literal["custom"] | None = None
    parameters: dict[str, Any] = Field(alias="input_schema")


class AnthropicToolChoice(bodies.LenientBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensBody(bodies.ModelRequest):
    """A request to count tokens. `thinking`, `metadata`, and `cache_control` are ignored."""

    unsupported = ("mcp_servers", "container")
    messages: Annotated[
        list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=bodies.MAX_MESSAGES)
    ]
    system: _blocks(bodies.TextPart) = Field(default_factory=list)  # type: ignore[valid-type]
    tools: Annotated[
        list[AnthropicTool] | None,
        Field(fail_fast=True, max_length=bodies.MAX_TOOLS),
        bodies.keep_tool_types(None, "custom"),
    ] = None
    tool_choice: AnthropicToolChoice | None = None
    stop_sequences: Annotated[list[str] | None, Field(max_length=bodies.MAX_STOPS)] = None
    output_config: bodies.FormatOptions | None = None

    def chat(self) -> bodies.ChatBody:
        system = [{"role": "system", "content": list(map(_part, self.system))}]
        chat = self.model_dump(include=_SAME)
        chat["messages"] = [
            *system[: len(self.system)],
            *chain.from_iterable(message.chat_messages() for message in self.messages),
        ]
        chat["stop"] = [stop for stop in self.stop_sequences or () if stop] or None
        if self.output_config is not None:
            chat["response_format"] = self.output_config.format
        if self.tools:
            chat["tools"] = [{"type": "function", "function": tool} for tool in self.tools]
        if self.tool_choice is not None:
            if (is_one := self.tool_choice.disable_parallel_tool_use) is not None:
                chat["parallel_tool_calls"] = not is_one
            chat["tool_choice"] = {
                "any": "required",
                "tool": {"type": "function", "function": {"name": self.tool_choice.name or ""}},
            }.get(self.tool_choice.type, self.tool_choice.type)
        return bodies.ChatBody.model_validate(chat)


class MessagesBody(CountTokensBody):
    max_tokens: int = Field(ge=1)


class MessagesReply(replies.EventReply):
    """A formatter for Anthropic messages and stream events. Reasoning is omitted."""

    id_prefix = "msg_"

    def __init__(self, served: ServedModel, body: bodies.ChatBody) -> None:
        super().__init__(served, body)
        self._content: list[Json] = []
        self._arguments = ""

    def comment(self, progress: str) -> bytes:
        return super().comment(progress) + b'event: ping\ndata: {"type": "ping"}\n\n'

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        super().begin(index, task)
        usage = {"input_tokens": len(task.prompt), "output_tokens": 0}
        return ({"type": "message_start", "message": self._message(None, "", usage)},)

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterator[Json]:
        if piece.call is not None and piece.call.id:
            use = {"type": "tool_use", "id": piece.call.id, "name": piece.call.name, "input": {}}
            yield from self._open(use)
        elif piece.content and (not self._content or self._content[-1]["type"] != "text"):
            yield from self._open({"type": "text", "text": ""})
        if piece.call is not None and piece.call.arguments:
            self._arguments += piece.call.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": piece.call.arguments})
        elif piece.content:
            self._content[-1]["text"] += piece.content
            yield self._delta({"type": "text_delta", "text": piece.content})

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._content.append(block)
        index = len(self._content) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if not self._content:
            return
        if self._content[-1]["type"] == "tool_use":
            self._content[-1]["input"] = replies.arguments_of(self._arguments)
            self._arguments = ""
        yield {"type": "content_block_stop", "index": len(self._content) - 1}

    def ending(self, end: replies.AnswerEnd) -> list[Json]:
        delta = {"stop_reason": _reason(end), "stop_sequence": end.stop or None}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": _usage(end.usage)},
            {"type": "message_stop"},
        ]

    def whole(self, end: replies.AnswerEnd) -> Json:
        for piece in end.pieces:
            list(self.pieces(piece, ()))
        self.ending(end)
        # Omit a call that the token limit truncated.
        self._content = [block for block in self._content if block.get("input", {}) is not None]
        return self._message(_reason(end), end.stop, _usage(end.usage))

    def failed(self, error: ApiError) -> Json:
        return error.anthropic_body

    def _message(self, reason: str | None, stop: str, usage: Json) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._content,
            "stop_reason": reason,
            "stop_sequence": stop or None,
            "usage": usage,
        }


def routes(api: Api) -> list[Route]:
    return [
        Route("/v1/messages", partial(_create, api), methods=["POST"]),
        Route("/v1/messages/count_tokens", partial(_count, api), methods=["POST"]),
    ]


async def _create(api: Api, request: Request) -> Response:
    body = await api.read(request, MessagesBody)
    chat = await run_in_threadpool(body.chat)
    return await api.answer(request, chat, TaskFactory.chat, MessagesReply)


async def _count(api: Api, request: Request) -> Response:
    body = await api.read(request, CountTokensBody)
    chat = await run_in_threadpool(body.chat)
    return await api.count(request, chat)


def _part(block: _Shown) -> Json:
    if not isinstance(block, ImageBlock):
        return {"type": "text", "text": block.text}
    return bodies.image_part(f"data:{block.source.media_type};base64,{block.source.data}")


def _reason(end: replies.AnswerEnd) -> str:
    return "stop_sequence" if end.stop else _REASONS.get(end.reason, "end_turn")


def _usage(usage: Json) -> Json:
    n_cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": usage["completion_tokens"],
        "pop": usage["pop"],
    }
