"""Ollama's API (docs/api.md in its repository), by its own client's types."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache, partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import gguf
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source, sampled_sha256
from pop_local import __version__
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.prompt.prompt import PLAIN_TEMPLATE
from pop_local.engine.tools.reader import Piece, calls_of
from pop_local.engine.turn import TokenLogprob
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError
from pop_local.server.model_listing import ModelInfo
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import (
    AnswerEnd,
    Json,
    OtherApiReply,
    arguments_of,
    chat_logprob,
    content_of,
    encoded,
)
from pop_local.server.request_bodies import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatBody,
    ChatToolCall,
    CompletionBody,
    LenientBody,
    ModelRequest,
    picture_part,
    schema_format,
)
from pop_local.server.request_images import MAX_PICTURES
from pop_local.server.task_factory import TaskFactory

# Clients ask for a version that has what they need; this one's API is what is here.
_VERSION = "0.6.4"
# Options that requests of ours have by the same name; all others are ignored.
_OPTIONS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop", "mirostat"),
    *("repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty"),
)
_NEVER = "2999-12-31T23:59:59Z"
_LONGEST_KEY = 1000  # characters of a key of the file that /api/show shows

Base64Images = Annotated[list[str], Field(fail_fast=True, max_length=MAX_PICTURES)]


class OllamaMessage(LenientBody):
    role: str
    content: str | None = None
    images: Base64Images | None = None
    tool_calls: Annotated[list[ChatToolCall] | None, Field(max_length=MAX_TOOLS)] = None

    @property
    def as_ours(self) -> Json:
        # The kind of a picture is that of its first bytes.
        shown = [picture_part(f"data:image/any;base64,{one}") for one in self.images or ()]
        text = {"type": "text", "text": self.content or ""}
        said: Json = {"role": self.role, "content": [*shown, text]}
        if self.tool_calls:
            said["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return said


class OllamaBody(ModelRequest):
    """The fields that both kinds of request share. `keep_alive` and `think` change nothing."""

    stream: bool | None = None
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def as_ours(self) -> Json:
        options = self.options or {}
        found = {name: options[name] for name in _OPTIONS if name in options}
        limit = options.get("num_predict", -1)
        found["n_predict"] = -1 if isinstance(limit, int) and limit <= 0 else limit
        if self.format == "json":
            found["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            found["response_format"] = schema_format(self.format)
        elif self.format:
            raise ApiError(400, 'format: give "json" or a schema', param="format")
        return found | {"model": self.model, "stream": self.stream is not False}

    def chat(self, messages: Sequence[OllamaMessage], **more: Any) -> ChatBody:
        said = [message.as_ours for message in messages]
        asked = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        return ChatBody.model_validate(self.as_ours | asked | more | {"messages": said})


class OllamaChat(OllamaBody):
    messages: Annotated[
        list[OllamaMessage] | None, Field(fail_fast=True, max_length=MAX_MESSAGES)
    ] = None
    tools: list[Any] | None = None


class OllamaGenerate(OllamaBody):
    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    images: Base64Images | None = None
    raw: bool | None = None
    template: str | None = None
    context: list[int] | None = None

    @model_validator(mode="after")
    def _is_answered(self) -> "OllamaGenerate":
        if self.template:
            raise ValueError("template is not supported: the model's own is used")
        if self.context:
            raise ValueError("context is not supported: send messages to /api/chat")
        if self.images and (self.raw or self.suffix):
            raise ValueError("images need the model's template: neither raw nor suffix")
        return self

    def completion(self) -> CompletionBody:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        asked = {"prompt": self.prompt or "", "suffix": self.suffix, "logprobs": logprobs}
        return CompletionBody.model_validate(self.as_ours | asked)

    def as_chat(self) -> ChatBody:
        system = [OllamaMessage(role="system", content=self.system)] if self.system else []
        asked = OllamaMessage(role="user", content=self.prompt, images=self.images)
        return self.chat([*system, asked])


class OllamaReply(OtherApiReply):
    """Answers in lines of JSON: those of /api/generate."""

    media_type = "application/x-ndjson"

    def comment(self, progress: str) -> bytes:
        return b""  # a line has no comments

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> tuple[Json, ...]:
        return (self._shown((piece,), logprobs),)

    def _shown(self, said: Sequence[Piece], logprobs: Sequence[TokenLogprob]) -> Json:
        found = {"model": self._model, "created_at": _now(), **self._told(said), "done": False}
        if self._wants_logprobs:
            found["logprobs"] = [chat_logprob(token) for token in logprobs]
        return found

    def _told(self, said: Sequence[Piece]) -> Json:
        return {"response": content_of(said)}

    def whole(
        self, said: Sequence[Piece], logprobs: Sequence[TokenLogprob], end: AnswerEnd
    ) -> Json:
        pop = end.usage["pop"]
        times = {
            "total_duration": pop["queued_s"] + pop["ttft_s"] + pop["decode_s"],
            "load_duration": 0,
            "prompt_eval_duration": pop["encode_s"] + pop["prefill_s"],
            "eval_duration": pop["decode_s"],
        }
        figures = {name: round(seconds * 1e9) for name, seconds in times.items()} | {
            "prompt_eval_count": end.usage["prompt_tokens"],
            "eval_count": end.usage["completion_tokens"],
            "pop": pop,
        }
        reason = "stop" if end.reason == "tool_calls" else end.reason
        return self._shown(said, logprobs) | {"done": True, "done_reason": reason} | figures

    def nothing(self) -> Response:
        """Answer a request that says nothing: elsewhere it loads the model, or unloads it."""
        self._wants_logprobs = False
        return JSONResponse(self._shown((), ()) | {"done": True, "done_reason": "load"})

    def failed(self, error: ApiError) -> Json:
        return error.ollama_body

    def frame(self, content: Json) -> bytes:
        return f"{encoded(content)}\n".encode()


class OllamaChatReply(OllamaReply):
    """Answers of /api/chat. A call is told as a whole, with its arguments as an object."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served)
        self._called: list[Piece] = []

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> tuple[Json, ...]:
        if piece.call is not None:
            self._called.append(piece)
            return ()
        return super().pieces(piece, logprobs)

    def ending(self, end: AnswerEnd) -> tuple[Json, ...]:
        calls = [self._shown(self._called, ())] if self._called else []
        return (*calls, *super().ending(end))

    def _told(self, said: Sequence[Piece]) -> Json:
        message: Json = {"role": "assistant", "content": content_of(said)}
        if thinking := "".join(piece.reasoning for piece in said):
            message["thinking"] = thinking
        called = [(call.name, arguments_of(call.arguments)) for call in calls_of(said)]
        if whole := [(name, arguments) for name, arguments in called if arguments is not None]:
            message["tool_calls"] = [
                {"function": {"name": name, "arguments": arguments}} for name, arguments in whole
            ]
        return {"message": message}


def routes(api: Api) -> list[Route]:
    return [
        Route("/api/version", partial(_version, api)),
        Route("/api/tags", partial(_tags, api)),
        Route("/api/ps", partial(_running, api)),
        Route("/api/show", partial(_show, api), methods=["POST"]),
        Route("/api/chat", partial(_chat, api), methods=["POST"]),
        Route("/api/generate", partial(_generate, api), methods=["POST"]),
    ]


async def _version(api: Api, request: Request) -> Response:
    return JSONResponse({"version": _VERSION, "pop_local": __version__})


async def _tags(api: Api, request: Request) -> Response:
    listed = await api.models.listed()
    return JSONResponse({"models": await run_in_threadpool(_cards, listed)})


async def _running(api: Api, request: Request) -> Response:
    more = {"expires_at": _NEVER, "size_vram": 0}
    cards = await run_in_threadpool(_cards, api.models.opened)
    return JSONResponse({"models": [card | more for card in cards]})


async def _show(api: Api, request: Request) -> Response:
    body = await api.read(request, ModelRequest)
    about = await api.models.about(api.file(request, body.model))
    return JSONResponse(await run_in_threadpool(_shown, about))


async def _chat(api: Api, request: Request) -> Response:
    body = await api.read(request, OllamaChat)
    if not body.messages:
        return OllamaChatReply(await api.served(request, body.model)).nothing()
    ours = body.chat(body.messages, tools=body.tools)
    return await api.answer(request, ours, TaskFactory.chat, OllamaChatReply)


async def _generate(api: Api, request: Request) -> Response:
    body = await api.read(request, OllamaGenerate)
    if not (body.prompt or body.images or body.suffix):
        return OllamaReply(await api.served(request, body.model)).nothing()
    if body.raw or body.suffix:
        return await api.answer(request, body.completion(), TaskFactory.completions, OllamaReply)
    return await api.answer(request, body.as_chat(), TaskFactory.chat, OllamaReply)


def _details(about: ModelInfo) -> Json:
    header = about.source.first
    family = str(header.get("general.architecture"))
    size = sum(tensor.n_elements for tensor in about.source.tensors)
    kind = header.get("general.file_type")
    kinds = {int(one): one.name.removeprefix("MOSTLY_") for one in gguf.LlamaFileType}
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M",
        "quantization_level": next((kinds[one] for one in kinds if one == kind), "unknown"),
    }


def _cards(listed: Sequence[ModelInfo]) -> list[Json]:
    """Those whose files are there and sound; an open model may have lost its own."""
    cards: list[Json] = []
    for one in listed:
        with suppress(PopError, OSError):
            cards.append(_card(one))
    return cards


def _card(about: ModelInfo) -> Json:
    tagged = about.name if ":" in about.name else f"{about.name}:latest"
    path = about.source.first.path
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": _changed(about),
        "size": about.source.size_bytes,
        "digest": _digest(path, path.stat().st_mtime_ns),
        "details": _details(about),
        "context_length": about.n_ctx,
    }


def _changed(about: ModelInfo) -> str:
    changed_s = about.source.first.path.stat().st_mtime
    return datetime.fromtimestamp(changed_s, timezone.utc).isoformat()


@lru_cache(maxsize=256)
def _digest(path: Path, _changed_ns: int) -> str:
    return sampled_sha256(read_source(path))


def _shown(about: ModelInfo) -> Json:
    header, details = about.source.first, _details(about)
    keys = {
        name: key.value
        for name, key in header.keys.items()
        if (isinstance(key.value, int | float) and isfinite(key.value))
        or (isinstance(key.value, str) and len(key.value) <= _LONGEST_KEY)
    }
    # Clients cut their prompts by it.
    keys[f"{details['family']}.context_length"] = about.n_ctx
    parameters = {"num_ctx": about.n_ctx, **recommended(header)}
    can = {"vision": about.can_see, "insert": about.can_infill, "tools": bool(about.template)}
    return {
        "license": keys.get("general.license", ""),
        "modelfile": f"FROM {about.name}",
        "parameters": "\n".join(f"{name} {value}" for name, value in parameters.items()),
        "template": about.template or PLAIN_TEMPLATE,
        "details": details,
        "model_info": keys,
        "capabilities": ["completion", *(name for name, has in can.items() if has)],
        "modified_at": _changed(about),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
