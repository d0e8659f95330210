"""Ollama's API, as documented in docs/api.md in Ollama's repository."""

import time
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

from pop_base.errors import PopError
from pop_converter.gguf.source import read_source, sampled_sha256
from pop_local import __version__
from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import TokenLogprob
from pop_local.engine.decode.sampler import recommended
from pop_local.engine.prompt.prompt import PLAIN_TEMPLATE
from pop_local.engine.tools.reader import Piece, calls_of
from pop_local.server import replies
from pop_local.server import request_bodies as bodies
from pop_local.server.api import Api
from pop_local.server.api_errors import ApiError
from pop_local.server.model_listing import ModelInfo
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import Json
from pop_local.server.request_images import MAX_IMAGES
from pop_local.server.task_factory import TaskFactory

# The version of Ollama's API that this module implements. Clients adapt to this version.
_VERSION = "0.6.4"
# Options that have the same name in GenerationBody. All other options are ignored.
_OPTIONS = (*SAMPLER_OPTIONS, "stop", "mirostat", "repeat_last_n")
_QUIET_S = 3.0
_NEVER = "2999-12-31T23:59:59Z"
_MAX_VALUE = 1000  # characters; /api/show omits longer header values

Base64Images = Annotated[list[str], Field(fail_fast=True, max_length=MAX_IMAGES)]


class OllamaMessage(bodies.LenientBody):
    role: str
    content: str | None = None
    images: Base64Images | None = None
    tool_calls: Annotated[list[bodies.ChatToolCall] | None, Field(max_length=bodies.MAX_TOOLS)] = (
        None
    )

    @property
    def chat_message(self) -> Json:
        # The MIME type is arbitrary, because an image's first bytes determine its format.
        images = [
            bodies.image_part(f"data:image/any;base64,{image}") for image in self.images or ()
        ]
        text = {"type": "text", "text": self.content or ""}
        message: Json = {"role": self.role, "content": [*images, text]}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class OllamaBody(bodies.ModelRequest):
    """The fields that /api/chat and /api/generate share. `keep_alive` and `think` are ignored."""

    stream: bool | None = None
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def common_fields(self) -> Json:
        """The request's fields, keyed by the names that OpenAI and llama-server use."""
        options = self.options or {}
        fields = {name: options[name] for name in _OPTIONS if name in options}
        limit = options.get("num_predict", -1)
        fields["n_predict"] = -1 if isinstance(limit, int) and limit <= 0 else limit
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            fields["response_format"] = {"type": "json_schema", "schema": self.format}
        elif self.format:
            raise ApiError(400, 'format must be "json" or a JSON schema', param="format")
        return fields | {"model": self.model, "stream": self.stream is not False}

    def chat(self, messages: Sequence[OllamaMessage], **more: Any) -> bodies.ChatBody:
        sent = [message.chat_message for message in messages]
        more |= {"messages": sent, "logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        return bodies.ChatBody.model_validate(self.common_fields | more)


class OllamaChat(OllamaBody):
    messages: Annotated[
        list[OllamaMessage] | None, Field(fail_fast=True, max_length=bodies.MAX_MESSAGES)
    ] = None
    tools: list[Any] | None = None


class OllamaGenerate(OllamaBody):
    unsupported = ("template", "context")
    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    images: Base64Images | None = None
    raw: bool | None = None

    @model_validator(mode="after")
    def _check_images(self) -> "OllamaGenerate":
        if self.images and (self.raw or self.suffix):
            raise ValueError("images cannot be combined with raw or suffix")
        return self


class OllamaReply(replies.OtherApiReply):
    """A formatter for replies to /api/generate. Streams consist of JSON lines."""

    media_type = "application/x-ndjson"

    _shown_s = 0.0

    def comment(self, progress: str) -> bytes:
        """Return an object with empty text as a keep-alive. JSON does not allow comments."""
        if (now_s := time.monotonic()) - self._shown_s < _QUIET_S:
            return b""
        self._shown_s = now_s
        return self.frame(self._event(()))

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> tuple[Json, ...]:
        return (self._event((piece,), logprobs),)

    def _event(self, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob] = ()) -> Json:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        event = {"model": self._model, "created_at": now, **self._content(pieces), "done": False}
        return event | ({"logprobs": [*map(replies.chat_logprob, logprobs)]} if logprobs else {})

    def _content(self, pieces: Sequence[Piece]) -> Json:
        return {"response": replies.text_of(pieces)}

    def whole(self, end: replies.AnswerEnd) -> Json:
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
        done = {"done": True, "done_reason": reason}
        return self._event(end.pieces, end.logprobs) | done | figures

    def loaded(self) -> Response:
        """Return the response to a request that has no prompt and only loads the model."""
        return JSONResponse(self._event(()) | {"done": True, "done_reason": "load"})

    def failed(self, error: ApiError) -> Json:
        return {"error": error.detail}

    def frame(self, content: Json) -> bytes:
        return f"{replies.encoded(content)}\n".encode()


class OllamaChatReply(OllamaReply):
    """A formatter for replies to /api/chat. Streams end with the complete tool calls."""

    def __init__(self, served: ServedModel, body: bodies.ChatBody | None = None) -> None:
        super().__init__(served, body)
        self._call_pieces: list[Piece] = []

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> tuple[Json, ...]:
        if piece.call is not None:
            self._call_pieces.append(piece)
            return ()
        return super().pieces(piece, logprobs)

    def ending(self, end: replies.AnswerEnd) -> tuple[Json, ...]:
        calls = [self._event(self._call_pieces)] if self._call_pieces else []
        return (*calls, *super().ending(end))

    def _content(self, pieces: Sequence[Piece]) -> Json:
        message: Json = {"role": "assistant", "content": replies.text_of(pieces)}
        if reasoning := replies.reasoning_of(pieces):
            message["thinking"] = reasoning
        functions = [
            {"function": {"name": call.name, "arguments": arguments}}
            for call in calls_of(pieces)
            if (arguments := replies.arguments_of(call.arguments)) is not None
        ]
        return {"message": message | ({"tool_calls": functions} if functions else {})}


class OllamaEmbedReply(replies.OtherApiReply):
    def joined(self, wholes: Sequence[Json], ends: Sequence[replies.AnswerEnd]) -> Json:
        return {
            "model": self._model,
            "embeddings": [end.embedding for end in ends],
            "prompt_eval_count": replies.total(ends)["prompt_tokens"],
        }


class OllamaTextBody(bodies.EmbeddingsBody):
    """A request to /api/embeddings, Ollama's older embeddings endpoint."""

    input: str = Field(alias="prompt")


class OllamaEmbeddingReply(OllamaEmbedReply):
    def joined(self, wholes: Sequence[Json], ends: Sequence[replies.AnswerEnd]) -> Json:
        return {"embedding": ends[0].embedding}


def routes(api: Api) -> list[Route]:
    version = JSONResponse({"version": _VERSION, "pop_local": __version__})
    embed = TaskFactory.embeddings
    return [
        Route("/api/version", version, methods=["GET"]),
        Route("/api/tags", partial(_tags, api)),
        Route("/api/ps", partial(_running, api)),
        Route("/api/show", partial(_show, api), methods=["POST"]),
        Route("/api/chat", partial(_chat, api), methods=["POST"]),
        Route("/api/generate", partial(_generate, api), methods=["POST"]),
        api.route("/api/embed", bodies.EmbeddingsBody, embed, OllamaEmbedReply),
        api.route("/api/embeddings", OllamaTextBody, embed, OllamaEmbeddingReply),
    ]


async def _tags(api: Api, request: Request) -> Response:
    listed = await api.models.listed()
    return JSONResponse({"models": await run_in_threadpool(_cards, listed)})


async def _running(api: Api, request: Request) -> Response:
    more = {"expires_at": _NEVER, "size_vram": 0}
    cards = await run_in_threadpool(_cards, api.models.opened)
    return JSONResponse({"models": [card | more for card in cards]})


async def _show(api: Api, request: Request) -> Response:
    body = await api.read(request, bodies.ModelRequest)
    info = await api.models.info(api.require_file(request, body.model))
    return JSONResponse(await run_in_threadpool(_description, info))


async def _chat(api: Api, request: Request) -> Response:
    body = await api.read(request, OllamaChat)
    if not body.messages:
        return OllamaChatReply(await api.served(request, body.model)).loaded()
    chat = body.chat(body.messages, tools=body.tools)
    return await api.answer(request, chat, TaskFactory.chat, OllamaChatReply)


async def _generate(api: Api, request: Request) -> Response:
    body = await api.read(request, OllamaGenerate)
    if not (body.prompt or body.images or body.suffix):
        return OllamaReply(await api.served(request, body.model)).loaded()
    if body.raw or body.suffix:
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        fields = {"prompt": body.prompt or "", "suffix": body.suffix, "logprobs": logprobs}
        completion = bodies.CompletionBody.model_validate(body.common_fields | fields)
        return await api.answer(request, completion, TaskFactory.completions, OllamaReply)
    system = [OllamaMessage(role="system", content=body.system)] if body.system else []
    question = OllamaMessage(role="user", content=body.prompt, images=body.images)
    chat = body.chat([*system, question])
    return await api.answer(request, chat, TaskFactory.chat, OllamaReply)


def _details(info: ModelInfo) -> Json:
    header = info.source.first
    family = str(header.get("general.architecture"))
    size = sum(tensor.n_elements for tensor in info.source.tensors)
    file_type = header.get("general.file_type")
    kinds = (kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType if kind == file_type)
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M",
        "quantization_level": next(kinds, "unknown"),
    }


def _cards(listed: Sequence[ModelInfo]) -> list[Json]:
    """Return descriptions of all models except those with unreadable files."""
    cards: list[Json] = []
    for info in listed:
        tagged = info.name if ":" in info.name else f"{info.name}:latest"
        path = info.source.first.path
        with suppress(PopError, OSError):
            card = {
                "name": tagged,
                "model": tagged,
                "modified_at": _changed(info),
                "size": info.source.size_bytes,
                "digest": _digest(path, path.stat().st_mtime_ns),
                "details": _details(info),
                "context_length": info.n_ctx,
            }
            cards.append(card)
    return cards


def _changed(info: ModelInfo) -> str:
    changed_s = info.source.first.path.stat().st_mtime
    return datetime.fromtimestamp(changed_s, timezone.utc).isoformat()


@lru_cache(maxsize=256)
def _digest(path: Path, _changed_ns: int) -> str:
    return sampled_sha256(read_source(path))


def _description(info: ModelInfo) -> Json:
    header, details = info.source.first, _details(info)
    keys = {
        name: key.value
        for name, key in header.keys.items()
        if (isinstance(key.value, int | float) and isfinite(key.value))
        or (isinstance(key.value, str) and len(key.value) <= _MAX_VALUE)
    }
    # Clients truncate prompts to this length.
    keys[f"{details['family']}.context_length"] = info.n_ctx
    parameters = {"num_ctx": info.n_ctx, **recommended(header)}
    can = {"vision": info.can_see, "insert": info.can_infill, "tools": bool(info.template)}
    return {
        "license": keys.get("general.license", ""),
        "modelfile": f"FROM {info.name}",
        "parameters": "\n".join(f"{name} {value}" for name, value in parameters.items()),
        "template": info.template or PLAIN_TEMPLATE,
        "details": details,
        "model_info": keys,
        "capabilities": ["completion", *(name for name, has in can.items() if has)],
        "modified_at": _changed(info),
    }
