"""llama-server's API, as documented in llama.cpp's tools/server/README.md."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pop_local import __version__
from pop_local.config.limits import MOST
from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import TokenLogprob
from pop_local.engine.decode.sampler import recommended
from pop_local.engine.prompt.infill import infilling
from pop_local.engine.tools.reader import Piece
from pop_local.engine.turn_options import TurnOptions
from pop_local.server import request_bodies as bodies
from pop_local.server.api import Api
from pop_local.server.api_errors import bad_request
from pop_local.server.model_listing import printable
from pop_local.server.model_pool import ServedModel
from pop_local.server.replies import AnswerEnd, Json, OtherApiReply, chat_logprob, text_of, timings
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Task

_MAX_FILES = 1000
# Fields that editor plug-ins send. Ignoring them can only make the answer longer or slower.
_HINTS = ("samplers", "n_indent", "t_max_predict_ms")


class LlamaBody(bodies.CompletionBody):
    """A request to /completion. Some field names differ from OpenAI's.

    If `n_predict` is 0, this server generates one token, whereas llama-server only fills its cache.
    """

    unsupported = (*bodies.CompletionBody.unsupported, "post_sampling_probs")
    return_tokens: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        # Chunks include token IDs only if they include log probabilities.
        n_top = body.get("n_probs") or (0 if body.get("return_tokens") else None)
        renamed = {"n": body.get("n_cmpl"), "logprobs": n_top}
        limit = body.get("n_predict")
        renamed["n_predict"] = -1 if limit is None else limit or 1
        return {**body, **renamed, "n_cmpl": None}


class ExtraFile(bodies.LenientBody):
    filename: str = "tmp"
    text: str


class InfillBody(LlamaBody):
    prompt: str = ""
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[
        list[ExtraFile], Field(default_factory=list, fail_fast=True, max_length=_MAX_FILES)
    ]

    @model_validator(mode="before")
    @classmethod
    def _without_hints(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if name not in _HINTS}


class TokenizeBody(bodies.ModelRequest):
    unsupported = ("with_pieces",)
    content: str
    add_special: bool = False
    parse_special: bool = True


class DetokenizeBody(bodies.ModelRequest):
    tokens: Annotated[list[int], Field(fail_fast=True)]


class LlamaReply(OtherApiReply):
    def __init__(self, served: ServedModel, body: LlamaBody) -> None:
        super().__init__(served, body)
        self._n_ctx = served.model.engine.context.n_ctx
        self._body = body

    def begin(self, index: int, task: Task) -> tuple[Json, ...]:
        self._has_new_line = False
        return super().begin(index, task)

    def pieces(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> tuple[Json, ...]:
        return (self._chunk(piece.content, logprobs),)

    def _chunk(self, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        tokens = [token.id for token in logprobs if self._body.return_tokens]
        chunk: Json = {"index": self._index, "content": text, "tokens": tokens, "stop": False}
        self._has_new_line |= "\n" in text
        if self._options.n_top_logprobs:
            chunk["completion_probabilities"] = [chat_logprob(token) for token in logprobs]
        return chunk

    def whole(self, end: AnswerEnd) -> Json:
        usage = end.usage
        kind = "limit" if end.reason == "length" else "word" if end.stop else "eos"
        return self._chunk(text_of(end.pieces), end.logprobs) | {
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage["completion_tokens"],
            "tokens_evaluated": usage["prompt_tokens"],
            "tokens_cached": usage["prompt_tokens_details"]["cached_tokens"],
            "truncated": False,
            "has_new_line": self._has_new_line,
            "stop_type": kind,
            "stopping_word": end.stop,
            "generation_settings": {"n_ctx": self._n_ctx, **_settings(self._options)},
            "timings": timings(usage),
            "pop": usage["pop"],
        }


def routes(api: Api) -> list[Route]:
    return [
        Route("/props", partial(_props, api)),
        Route("/slots", partial(_slots, api)),
        Route("/apply-template", partial(_apply_template, api), methods=["POST"]),
        Route("/tokenize", partial(_tokenize, api), methods=["POST"]),
        Route("/detokenize", partial(_detokenize, api), methods=["POST"]),
        api.route("/completion", LlamaBody, TaskFactory.completions, LlamaReply),
        api.route("/completions", LlamaBody, TaskFactory.completions, LlamaReply),
        api.route("/infill", InfillBody, _infilling, LlamaReply),
    ]


async def _props(api: Api, request: Request) -> Response:
    """Describe a model without opening it, because web pages must not be able to load models."""
    file = api.require_file(request, request.query_params.get("model"))
    info = await api.models.info(file)
    template = info.open_template
    settings = _settings(TurnOptions(**recommended(info.source.first)))  # type: ignore[arg-type]
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": info.n_ctx, "params": settings},
            "total_slots": info.n_parallel,
            "model_alias": info.name,
            "model_path": printable(info.source.first.path.name),
            "modalities": {"vision": info.can_see, "audio": False},
            "chat_template": template.source if template else info.template,
            "bos_token": template.bos if template else "",
            "eos_token": template.eos if template else "",
            "build_info": f"pop-local {__version__}",
            "is_sleeping": not info.is_loaded,
        }
    )


async def _slots(api: Api, request: Request) -> Response:
    """List the slots of all open models, or only those of the model in the query."""
    name = request.query_params.get("model")
    slots = [
        _slot(served, number, request.state.cache_scope)
        for served in api.models.loaded
        if name in (None, served.name)
        for number in range(len(served.model.engine.sequences))
    ]
    return JSONResponse(slots)


def _slot(served: ServedModel, number: int, cache_scope: str) -> Json:
    """Describe a slot. `left_s` is the estimated number of seconds until the prompt has been read.

    `job` is the id of the slot's latest job, and `n_behind` is the number of rows that can catch
    up. If another `cache_scope` owns the rows, the result omits `job`, `n_behind`, and the prompt
    length.
    """
    job, n_ctx = served.worker.running.get(number), served.model.engine.context.n_ctx
    slot = {"id": number, "model": served.name, "n_ctx": n_ctx, "speculative": False}
    sequence = served.model.engine.sequences[number]
    if sequence.states.scope != cache_scope:
        return slot | {"is_processing": job is not None}
    refiller = sequence.refiller
    slot["n_behind"] = refiller.n_refillable if refiller.is_on else 0
    slot["job"] = served.worker.latest_ids.get(number)
    if job is None:
        return slot | {"is_processing": False}
    n_read, n_rows = job.read
    reading = {"n_read": n_read, "n_rows": n_rows, "left_s": job.left_s}
    return slot | {"is_processing": True, **reading}


async def _apply_template(api: Api, request: Request) -> Response:
    served, task = await api.prepared(request, await api.read(request, bodies.ChatBody))
    return JSONResponse({"prompt": served.tasks.rendered(task.prompt)})


async def _tokenize(api: Api, request: Request) -> Response:
    body = await api.read(request, TokenizeBody)
    served = await api.served(request, body.model)
    tokenize = partial(
        served.model.engine.context.vocabulary.tokenize,
        body.content,
        add_bos=body.add_special,
        special=body.parse_special,
    )
    return JSONResponse({"tokens": await api.work(request, served, tokenize)})


async def _detokenize(api: Api, request: Request) -> Response:
    body = await api.read(request, DetokenizeBody)
    served = await api.served(request, body.model)

    def work() -> str:
        served.tasks.check_tokens(body.tokens, "tokens")
        return served.tasks.text(body.tokens)

    return JSONResponse({"content": await api.work(request, served, work)})


def _infilling(tasks: TaskFactory, body: InfillBody) -> list[Task]:
    files = [(file.filename, file.text) for file in body.input_extra]
    context = tasks.model.engine.context
    with bad_request():
        tokens = infilling(context, body.input_prefix, body.input_suffix, body.prompt, files)
    return tasks.completions(body.model_copy(update={"prompt": tokens, "suffix": None}))


def _settings(options: TurnOptions) -> Json:
    return {
        "n_predict": -1 if options.max_tokens in (None, MOST) else options.max_tokens,
        "stop": list(options.stops),
        **{name: getattr(options, name) for name in SAMPLER_OPTIONS},
        "seed": -1 if options.seed is None else options.seed,
    }
