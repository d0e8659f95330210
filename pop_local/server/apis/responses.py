"""OpenAI's Responses API."""

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import TokenLogprob, ToolCall
from pop_local.engine.tools.reader import Piece
from pop_local.server import request_bodies as bodies
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import AnswerEnd, EventReply, Json, call_json
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Task

# Fields that have the same name in ChatBody, which validates them.
_SAME = {"model", "stream", "pop", "parallel_tool_calls", *SAMPLER_OPTIONS}
# Request fields that the response repeats.
_REPEATED = {
    *("instructions", "previous_response_id", "max_output_tokens"),
    *("temperature", "top_p", "tool_choice"),
}
# Limit on the estimated total size of stored responses, in bytes.
_MAX_STORED = 1 << 25


class TextContent(bodies.LenientBody):
    type: Literal["input_text", "output_text", "text"]
    text: str


class ImageContent(bodies.LenientBody):
    type: Literal["input_image"]
    image_url: str


ContentParts = Annotated[
    list[Annotated[TextContent | ImageContent, Field(discriminator="type")]],
    Field(fail_fast=True, max_length=bodies.MAX_PARTS),
    bodies.wrap_text(lambda text: {"type": "input_text", "text": text}),
]


class MessageItem(bodies.LenientBody):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: ContentParts


# A result without an ID belongs to the first call that has no result.
CallId = Annotated[str, bodies.replace(None, "")]


class FunctionCallItem(bodies.LenientBody):
    type: Literal["function_call"]
    call_id: CallId = ""
    name: str
    arguments: str


class FunctionOutputItem(bodies.LenientBody):
    type: Literal["function_call_output"]
    call_id: CallId = ""
    output: ContentParts


class ReasoningItem(bodies.LenientBody):
    type: Literal["reasoning"]


InputItem = Annotated[
    Annotated[
        MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem,
        Field(discriminator="type"),
    ],
    BeforeValidator(
        lambda item: (
            {"type": "message", **item} if isinstance(item, dict) and "role" in item else item
        )
    ),
]


class ResponsesTool(bodies.FunctionSpec):
    type: Literal["function"]


def _names_of_unused(tools: Any) -> list[str]:
    """Return the name or type of each tool, such as web_search, that is left out of the prompt."""
    objects = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    unused = [tool for tool in objects if tool.get("type") != "function"]
    return [str(tool.get("name") or tool.get("type")) for tool in unused]


def _chat_choice(choice: Any) -> Any:
    """Convert a tool choice to the Chat Completions format, so that ChatBody can validate it."""
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "allowed_tools":
        tools = choice.get("tools")
        tools = [*map(_chat_choice, tools)] if isinstance(tools, list) else tools
        return {"type": kind, kind: {"mode": choice.get("mode"), "tools": tools}}
    return {"type": kind, "function": {"name": choice.get("name")}}


class ResponsesBody(bodies.ModelRequest):
    """A request to /v1/responses. The fields `metadata`, `user`, and `reasoning` are ignored."""

    unsupported = (
        *("conversation", "background", "prompt", "max_tool_calls", "top_logprobs"),
        *("stop", "logit_bias"),
    )
    input: Annotated[
        list[InputItem],
        Field(fail_fast=True, max_length=bodies.MAX_MESSAGES),
        bodies.wrap_text(lambda text: {"role": "user", "content": text}),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    store: bool | None = None
    tools: Annotated[
        list[ResponsesTool] | None,
        Field(fail_fast=True, max_length=bodies.MAX_TOOLS),
        bodies.keep_tool_types("function"),
    ] = None
    unused_tools: Annotated[list[str], BeforeValidator(_names_of_unused)] = Field(
        [], validation_alias="tools"
    )
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: bodies.FormatOptions | None = None

    def chat(self, earlier: Sequence[Json]) -> bodies.ChatBody:
        """Return the request as a chat that continues the messages in `earlier`."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return bodies.ChatBody.model_validate(
            {
                "messages": [*system, *earlier, *self.messages()],
                "max_tokens": self.max_output_tokens,
                "tools": [{"type": "function", "function": tool} for tool in self.tools or ()],
                "tool_choice": _chat_choice(self.tool_choice),
                "response_format": self.text and self.text.format,
                **self.model_dump(include=_SAME),
            }
        )

    def messages(self) -> list[Json]:
        """Convert the input to chat messages, adding tool calls to the last assistant message."""
        messages: list[Json] = []
        for item in self.input:
            if isinstance(item, MessageItem):
                messages.append({"role": item.role, "content": _parts(item.content)})
            elif isinstance(item, FunctionOutputItem):
                output = _parts(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            elif isinstance(item, FunctionCallItem):
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                call = call_json(ToolCall(item.call_id, item.name, item.arguments))
                messages[-1].setdefault("tool_calls", []).append(call)
        return messages


class StoredResponse(NamedTuple):
    """A response, its input items, and the messages in the conversation up to that response.

    Only requests with the cache scope `owner` may use the response.
    """

    owner: str
    response: Json
    items: list[Json]
    messages: list[Json]


class ResponseStore:
    """Stored responses, which clients can retrieve or continue (`previous_response_id`)."""

    def __init__(self) -> None:
        # The least recently used response comes first.
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._n_bytes = 0

    def get(self, name: str, owner: str) -> StoredResponse | None:
        stored = self._stored.get(name)
        if stored is None or stored.owner != owner:
            return None
        self._stored.move_to_end(name)
        return stored

    def messages(self, name: str | None, owner: str) -> list[Json]:
        """Return a conversation's messages, ending with the given response.

        Raises ApiError if the response is not stored.
        """
        if not name:
            return []
        if (stored := self.get(name, owner)) is None:
            raise ApiError(
                400,
                f"response {name!r} is not stored: send all messages in the conversation",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return stored.messages

    def add(self, stored: StoredResponse) -> None:
        self._stored[stored.response["id"]] = stored
        self._n_bytes += _size([*stored])
        while self._n_bytes > _MAX_STORED:
            self.remove(next(iter(self._stored)))

    def remove(self, name: str) -> None:
        self._n_bytes -= _size([*self._stored.pop(name)])


class ResponsesReply(EventReply):
    """A formatter for OpenAI's responses and stream events. Reasoning is omitted."""

    id_prefix = "resp_"

    def __init__(
        self,
        served: ServedModel,
        chat: bodies.ChatBody,
        *,
        body: ResponsesBody,
        earlier: list[Json],
        store: ResponseStore,
        owner: str,
    ) -> None:
        super().__init__(served, chat)
        self._body, self._earlier, self._store, self._owner = body, earlier, store, owner
        self._output: list[Json] = []
        self._n_events = 0

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        super().begin(index, task)
        begun = self._response("in_progress")
        return (self._event("created", response=begun), self._event("in_progress", response=begun))

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterator[Json]:
        if piece.call is not None and piece.call.id:
            call = {"call_id": piece.call.id, "name": piece.call.name, "arguments": ""}
            yield from self._open("fc", "function_call", call)
        elif piece.content and (not self._output or self._output[-1]["type"] != "message"):
            yield from self._open("msg", "message", {"role": "assistant", "content": []})
            part = {"type": "output_text", "text": "", "annotations": []}
            yield self._of_item("content_part.added", content_index=0, part=part)
            self._output[-1]["content"].append(dict(part))
        if piece.call is not None and piece.call.arguments:
            self._output[-1]["arguments"] += piece.call.arguments
            yield self._of_item("function_call_arguments.delta", delta=piece.call.arguments)
        elif piece.content:
            self._output[-1]["content"][0]["text"] += piece.content
            text = {"content_index": 0, "delta": piece.content, "logprobs": []}
            yield self._of_item("output_text.delta", **text)

    def _open(self, id_prefix: str, kind: str, fields: Json) -> Iterator[Json]:
        """Yield the events that end the last output item and start a new one."""
        yield from self._close()
        item = {"type": kind, "id": f"{id_prefix}_{uuid.uuid4().hex}", "status": "in_progress"}
        self._output.append(item | fields)
        index = len(self._output) - 1
        yield self._event("output_item.added", output_index=index, item=deepcopy(item | fields))

    def _close(self) -> Iterator[Json]:
        """Yield the events that end the last output item, unless it has already ended."""
        if not self._output or self._output[-1]["status"] == "completed":
            return
        item = self._output[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            [part] = item["content"]
            text = {"content_index": 0, "text": part["text"], "logprobs": []}
            yield self._of_item("output_text.done", **text)
            yield self._of_item("content_part.done", content_index=0, part=part)
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("function_call_arguments.done", **call)
        index = len(self._output) - 1
        yield self._event("output_item.done", output_index=index, item=item)

    def ending(self, end: AnswerEnd) -> list[Json]:
        closed = [*self._close()]
        status = "incomplete" if end.reason == "length" else "completed"
        response = self._response(status, end)
        if self._body.store is not False:
            # A later request may continue the conversation from this response.
            output = self._body.model_validate({"input": self._output})
            messages = [*self._earlier, *self._body.messages(), *output.messages()]
            items = [item.model_dump() for item in self._body.input]
            items = [{"id": f"msg_{uuid.uuid4().hex}", **item} for item in items]
            self._store.add(StoredResponse(self._owner, response, items, messages))
        return [*closed, self._event(status, response=response)]

    def whole(self, end: AnswerEnd) -> Json:
        for piece in end.pieces:
            list(self.pieces(piece, ()))
        response: Json = self.ending(end)[-1]["response"]
        return response

    def failed(self, error: ApiError) -> Json:
        failure = {"code": error.code or "server_error", "message": error.detail}
        return self._event("failed", response=self._response("failed") | {"error": failure})

    def _event(self, kind: str, **fields: Any) -> Json:
        self._n_events += 1
        return {"type": f"response.{kind}", "sequence_number": self._n_events - 1, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Json:
        index = len(self._output) - 1
        return self._event(kind, item_id=self._output[-1]["id"], output_index=index, **fields)

    def _response(self, status: str, end: AnswerEnd | None = None) -> Json:
        body = self._body
        repeated = body.model_dump(include=_REPEATED)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            **repeated,
            "text": body.text and body.text.model_dump(by_alias=True, exclude_unset=True),
            "tool_choice": repeated["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "metadata": {},
            "output": [dict(item) for item in self._output],
            "usage": None if end is None else _usage(end.usage, body.unused_tools),
        }


def routes(api: Api) -> list[Route]:
    store = ResponseStore()
    return [
        Route("/v1/responses", partial(_create, api, store), methods=["POST"]),
        Route("/v1/responses/{name}/input_items", partial(_items, store)),
        Route("/v1/responses/{name}", partial(_stored, store), methods=["GET", "DELETE"]),
    ]


async def _create(api: Api, store: ResponseStore, request: Request) -> Response:
    body = await api.read(request, ResponsesBody)
    owner = request.state.cache_scope
    earlier = store.messages(body.previous_response_id, owner)
    chat = await run_in_threadpool(body.chat, earlier)
    reply = partial(ResponsesReply, body=body, earlier=earlier, store=store, owner=owner)
    return await api.answer(request, chat, TaskFactory.chat, reply)


def _require_stored(store: ResponseStore, request: Request) -> StoredResponse:
    stored = store.get(name := request.path_params["name"], request.state.cache_scope)
    if stored is None:
        message = f"response {name!r} is not stored: the server keeps only recent responses"
        raise ApiError(404, message, code="response_not_found")
    return stored


async def _stored(store: ResponseStore, request: Request) -> Response:
    stored = _require_stored(store, request)
    if request.method != "DELETE":
        return JSONResponse(stored.response)
    store.remove(name := stored.response["id"])
    return JSONResponse({"id": name, "object": "response", "deleted": True})


async def _items(store: ResponseStore, request: Request) -> Response:
    items = _require_stored(store, request).items
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
    return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})


def _parts(content: Sequence[TextContent | ImageContent]) -> list[Json]:
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextContent)
        else bodies.image_part(part.image_url)
        for part in content
    ]


def _size(value: Any) -> int:
    """Estimate a JSON value's memory use in bytes."""
    if isinstance(value, dict | list):
        return 100 + sum(map(_size, value.values() if isinstance(value, dict) else value))
    return 100 + (len(value) if isinstance(value, str) else 0)


def _usage(usage: Json, unused_tools: list[str]) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "pop": {**usage["pop"], "ignored": [*usage["pop"]["ignored"], *unused_tools]},
    }
