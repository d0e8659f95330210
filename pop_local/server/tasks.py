"""From a request's body to a task for the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.errors import PopError
from pop_local.engine.decode.grammar import GrammarError, check_grammar, schema_grammar
from pop_local.engine.decode.text import Pieces
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompts import Prompt
from pop_local.engine.turn import Message, TurnOptions
from pop_local.server.bodies import Body, ChatBody, ChatMessage, CompletionBody, ResponseFormat
from pop_local.server.errors import ApiError, context_exceeded
from pop_local.server.worker import Task

# As in OpenAI's API; chats go on to the end of the context.
COMPLETION_TOKENS = 16
# Below this the division of logits by the temperature loses all meaning: greedy.
_LOWEST_TEMPERATURE = 0.01

NO_KEYS = "the model has no pruning keys"
REQUESTED = "the request asks for it"
SERVER_OFF = "the server runs with --no-pop"
PROMPT_LOGPROBS = "log probabilities of the prompt need every layer"


@dataclass(frozen=True)
class Asked:
    """A task, and why it runs in full (None: it is pruned).

    `n_characters`: of the prompt, where text offsets are asked for.
    """

    task: Task
    reason: str | None
    n_characters: int = 0


class Tasks:
    """Makes tasks: tokenises, and checks what can be checked before the queue.

    May be used from several threads, while the model decodes in another one.
    """

    def __init__(self, model: PopModel) -> None:
        self._model = model
        self._default = model.pop_mode

    def chat(self, body: ChatBody) -> Asked:
        try:
            prompt = self._model.chat_prompt([_message(message) for message in body.messages])
        except PopError as error:
            raise ApiError(400, error.message, param="messages") from error
        self._check_length(prompt, "messages")
        mode, reason = self._mode(body.pop)
        options = _options(
            body,
            self._model.recommended,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            grammar=self._grammar(body),
            n_top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return Asked(Task(prompt, options, mode), reason)

    def completion(self, body: CompletionBody) -> Asked:
        prompt = Prompt(self._tokens(body.prompt), ())
        self._check_length(prompt, "prompt")
        mode, reason = self._mode(body.pop)
        n_prompt_logprobs = body.logprobs if body.echo else None
        if n_prompt_logprobs is not None:
            mode, reason = Mode.OFF, PROMPT_LOGPROBS
        options = _options(
            body,
            self._model.recommended,
            max_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
            grammar=self._grammar(body),
            n_top_logprobs=body.logprobs,
        )
        text = self._text(prompt.tokens) if body.echo or body.logprobs is not None else ""
        echo = text if body.echo else ""
        return Asked(Task(prompt, options, mode, echo, n_prompt_logprobs), reason, len(text))

    def _text(self, tokens: Sequence[int]) -> str:
        pieces = Pieces(self._model.vocab, special=True)
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    def _mode(self, pop: bool | None) -> tuple[Mode, str | None]:
        if not self._model.can_switch:
            if pop:
                raise ApiError(400, f"{NO_KEYS}: it cannot be pruned", param="pop")
            return Mode.OFF, NO_KEYS
        if pop is None:
            return self._default, SERVER_OFF if self._default is Mode.OFF else None
        return (Mode.CONTEXT, None) if pop else (Mode.OFF, REQUESTED)

    def _tokens(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[int]:
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "send one prompt per request", param="prompt")
            return self._tokens(prompt[0])
        if isinstance(prompt, str):
            return self._model.tokenize(prompt.encode(), add_bos=True, special=True)
        tokens = [token for token in prompt if isinstance(token, int)]
        n_vocab = self._model.n_vocab()
        if any(not 0 <= token < n_vocab for token in tokens):
            raise ApiError(400, f"token ids go from 0 to {n_vocab - 1}", param="prompt")
        return tokens

    def _check_length(self, prompt: Prompt, param: str) -> None:
        n_prompt, n_ctx = len(prompt.tokens), self._model.n_ctx()
        if n_prompt == 0:
            raise ApiError(400, "the prompt is empty", param=param)
        if n_prompt >= n_ctx:
            raise context_exceeded(n_prompt, n_ctx, param)

    def _grammar(self, body: Body) -> str | None:
        text, param = body.grammar, "grammar"
        try:
            if body.response_format is not None:
                text, param = _format_grammar(body.response_format), "response_format"
            if text is not None:
                check_grammar(self._model.vocab, text)
        except GrammarError as error:
            raise ApiError(400, error.message, code="invalid_grammar", param=param) from error
        return text


def _message(message: ChatMessage) -> Message:
    return Message("system" if message.role == "developer" else message.role, message.text)


def _format_grammar(wanted: ResponseFormat) -> str | None:
    if wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return schema_grammar({"type": "object"})
    return schema_grammar(wanted.json_schema.schema_)


def _options(body: Body, recommended: Mapping[str, float], **known: Any) -> TurnOptions:
    """Where the body says nothing, what the model recommends, else the engine's defaults."""
    names: Sequence[str] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
    )
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if given.get("temperature", 1.0) < _LOWEST_TEMPERATURE:
        given["temperature"] = 0.0
    if body.seed is not None and body.seed != -1:
        given["seed"] = body.seed & 0xFFFFFFFF
    chosen: dict[str, Any] = {**recommended, **given}
    return TurnOptions(stops=tuple(body.stop or ()), **chosen, **known)
