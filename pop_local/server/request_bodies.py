"""Request bodies. Unknown fields are ignored, but requests with unsupported fields are refused.

Validation blocks the event loop, so it limits the length of lists and stops at the first error.
"""

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from pop_local.config.limits import MOST, MOST_SEED
from pop_local.config.sampler_options import SAMPLER_OPTIONS, SamplerOption

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_MESSAGES = 10_000
MAX_ANSWERS = 128  # per request
MAX_TEXTS = 2048
MAX_PARTS = 1_000
MAX_TOOLS = 256
MAX_BIASES = 1024

_FIELDS = json.loads(Path(__file__).with_name("unsupported_fields.json").read_text("utf-8"))


class LenientBody(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class ModelRequest(LenientBody):
    """A request for `model` (None: the default model).

    Requests with an `unsupported` field are refused, because ignoring it would change the answer.
    """

    unsupported: ClassVar[tuple[str, ...]] = ()
    model: str | None = None

    @model_validator(mode="after")
    def _check_supported(self) -> "ModelRequest":
        for name in self.unsupported:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} is not supported: remove this field")
        return self


class StreamOptions(LenientBody):
    include_usage: bool | None = None


class JsonSchema(LenientBody):
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(LenientBody):
    """An answer's format. Some clients send `schema` instead of `json_schema.schema`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _require_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("send the schema as json_schema.schema")
        return self


class FormatOptions(LenientBody):
    """The format options that OpenAI calls `text` and Anthropic calls `output_config`."""

    format: ResponseFormat | None = None


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


class TextPart(LenientBody):
    type: Literal["text"]
    text: str


class ImageUrl(LenientBody):
    url: str


class ImagePart(LenientBody):
    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None or isinstance(content, list):
        return content
    raise ValueError("the content must be a string or a list of parts")


def replace(sent: Any, meant: Any) -> BeforeValidator:
    """Return a validator that replaces the value `sent` with `meant`."""
    return BeforeValidator(lambda value: meant if value == sent else value)


def wrap_text(wrap: Callable[[str], Any]) -> BeforeValidator:
    """Return a validator that replaces a string with a one-item list, `[wrap(string)]`."""
    return BeforeValidator(lambda value: [wrap(value)] if isinstance(value, str) else value)


def _as_json(arguments: Any) -> Any:
    """Encode arguments as JSON if the client sent an object, as Ollama's clients do."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


class FunctionCall(LenientBody):
    name: str
    arguments: Annotated[str, BeforeValidator(_as_json), replace(None, "{}")] = "{}"


class ChatToolCall(LenientBody):
    id: Annotated[str, replace(None, "")] = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionSpec(LenientBody):
    """A function that the model may call. `parameters` is enforced even without `strict`."""

    name: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChatTool(LenientBody):
    type: Literal["function"]
    function: FunctionSpec


def keep_tool_types(*types: str | None) -> BeforeValidator:
    """Return a validator that drops vendor-specific tools, whose types are not in `types`."""

    def kept(tools: Any) -> Any:
        if not isinstance(tools, list):
            return tools
        return [tool for tool in tools if not isinstance(tool, dict) or tool.get("type") in types]

    return BeforeValidator(kept)


class NamedToolChoice(ChatTool):
    type: Literal["function"] = "function"


class AllowedTools(LenientBody):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(LenientBody):
    """A tool choice that lists all tools in the prompt but allows calls to only some of them."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatMessage(LenientBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None,
        Field(fail_fast=True, max_length=MAX_PARTS),
        BeforeValidator(_as_parts),
    ] = None
    tool_calls: Annotated[list[ChatToolCall] | None, Field(max_length=MAX_TOOLS)] = None
    tool_call_id: Annotated[str, replace(None, "")] = ""

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or () if isinstance(part, TextPart))

    @property
    def image_urls(self) -> list[tuple[int, str]]:
        """Return an (offset, URL) pair for each image. Offsets are positions in `text`."""
        urls: list[tuple[int, str]] = []
        offset = n_texts = 0
        for part in self.content or ():
            if isinstance(part, TextPart):
                offset += len(part.text) + (n_texts > 0)
                n_texts += 1
            else:
                urls.append((offset, part.image_url.url))
        return urls


def _as_biases(sent: Any) -> Any:
    """Convert OpenAI's object, whose keys are token IDs, to llama-server's list of pairs."""
    pairs = sent.items() if isinstance(sent, dict) else ()
    named = [[int(key) if re.fullmatch("-?[0-9]+", key) else key, bias] for key, bias in pairs]
    return named if isinstance(sent, dict) else sent


# Each pair has a token ID (or a string, for all its tokens) and a bias (false: never sample).
LogitBias = Annotated[
    list[tuple[int | str, Literal[False] | Annotated[float, Field(ge=-1e6, le=1e6)]]] | None,
    Field(fail_fast=True, max_length=MAX_BIASES),
    BeforeValidator(_as_biases),
]
Limit = Annotated[int | None, replace(-1, MOST)]  # -1 is llama.cpp's "no limit"


def _sampling_field(option: SamplerOption) -> Any:
    """Return the annotation and default of a request field for a sampling option."""
    field = Field(
        None,
        ge=option.least,
        le=option.most,
        validation_alias=AliasChoices(option.name, *option.aliases),
    )
    kind: Any = option.kind | None
    return kind if option.off is None else Annotated[kind, replace(option.off, 0)], field


def _wrap_seed(seed: int | None) -> int | None:
    """Replace -1, llama.cpp's random seed, with None, and reduce other seeds to 32 bits."""
    return None if seed in (None, -1) else seed % (MOST_SEED + 1)


SamplingFields = create_model(
    "SamplingFields",
    __base__=LenientBody,
    **{name: _sampling_field(option) for name, option in SAMPLER_OPTIONS.items()},
)


class GenerationBody(ModelRequest, SamplingFields):  # type: ignore[misc, valid-type]
    """The fields that chats and text completions share (None: the server's default).

    llama.cpp's name for `max_tokens` is `n_predict`, and OpenAI's newer name is
    `max_completion_tokens`.
    """

    unsupported: ClassVar[tuple[str, ...]] = tuple(chain(*_FIELDS["unsupported"].values()))
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit = Field(None, ge=0)
    max_completion_tokens: Limit = Field(None, ge=1)
    n_predict: Limit = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    seed: Annotated[int | None, AfterValidator(_wrap_seed)] = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(max_length=MAX_STOPS),
        wrap_text(lambda stop: stop),
        replace("", None),
    ] = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    logit_bias: LogitBias = None
    return_progress: bool | None = None
    grammar: Annotated[str | None, replace("", None)] = None
    pop: bool | None = None
    repeatable: bool | None = None
    cache_prompt: bool | None = None

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens to generate, taken from the first field that is set."""
        limits = (self.n_predict, self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in limits if limit is not None), None)

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must match (None: free text)."""
        form = self.response_format
        if self.json_schema is not None:
            return self.json_schema
        if form is None or form.type == "text":
            return None
        return form.json_schema.schema_ if form.json_schema else form.schema_ or {"type": "object"}

    @property
    def has_grammar(self) -> bool:
        return self.grammar is not None or self.answer_schema is not None

    @model_validator(mode="after")
    def _check_values(self) -> "GenerationBody":
        extra = self.model_extra or {}
        for name, accepted in _FIELDS["accepted_values"].items():
            if extra.get(name) not in (None, *accepted):
                raise ValueError(
                    f"{name} must be {json.dumps(accepted[0])}: no other value is supported"
                )
        if extra.get("reasoning_effort") == "none":
            raise ValueError("reasoning_effort must not be none: reasoning cannot be disabled")
        if self.grammar is not None and self.answer_schema is not None:
            raise ValueError("send grammar or response_format, not both")
        return self


class ChatBody(GenerationBody):
    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[ChatTool] | None, Field(fail_fast=True, max_length=MAX_TOOLS)] = None
    tool_choice: (
        Literal["auto", "none", "required"] | AllowedToolsChoice | NamedToolChoice | None
    ) = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def has_images(self) -> bool:
        return any(message.image_urls for message in self.messages)

    @property
    def has_tools(self) -> bool:
        """True if this request or an earlier turn of the chat uses tools."""
        return bool(self.tools) or any(
            message.tool_calls or message.role == "tool" for message in self.messages
        )

    @property
    def has_grammar(self) -> bool:
        return super().has_grammar or self.has_tools

    @model_validator(mode="after")
    def _check_combination(self) -> "ChatBody":
        if self.limit == 0:
            raise ValueError("max_tokens must be at least 1")
        if self.tools and self.grammar is not None:
            raise ValueError("send tools or grammar, not both")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError(
                    "continue_final_message conflicts with add_generation_prompt: true"
                )
            if self.has_tools:
                raise ValueError("continue_final_message cannot be combined with tools")
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls or last.image_urls:
                raise ValueError(
                    "continue_final_message requires a text-only assistant message at the end"
                )
        elif self.add_generation_prompt is False:
            raise ValueError("add_generation_prompt: false requires continue_final_message: true")
        if not self.tools and self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice requires tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        return self


Tokens = Annotated[list[int], Field(fail_fast=True)]
# One prompt: token IDs and strings to tokenize.
MixedTokens = Annotated[list[int | str], Field(fail_fast=True)]


def _simplified(prompt: Any) -> Any:
    """Replace llama-server's prompt objects with their text (`prompt_string` or `content`)."""
    if isinstance(prompt, list):
        is_plain = not any(isinstance(item, dict) for item in prompt)
        return prompt if is_plain else [_simplified(item) for item in prompt]
    if not isinstance(prompt, dict):
        return prompt
    parts = prompt.get("content")
    if not isinstance(parts, list):
        return prompt.get("prompt_string") if prompt.keys() == {"prompt_string"} else prompt
    texts = [item["text"] for item in parts if isinstance(item, dict) and "text" in item]
    are_texts = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if are_texts else prompt


def _check_prompts(prompt: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        prompts = handler(prompt)
    except ValidationError:
        prompts = None
    # A list of too many strings passes validation as MixedTokens.
    if prompts is None or len(as_prompts(prompts)) > MAX_TEXTS:
        raise ValueError(
            f"send one text or a list of up to {MAX_TEXTS}, each as a string or a list of token IDs"
        )
    return prompts


Prompts = Annotated[
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_TEXTS)]
    | Tokens
    | Annotated[list[Tokens], Field(fail_fast=True, max_length=MAX_TEXTS)]
    | MixedTokens
    | Annotated[list[str | MixedTokens], Field(fail_fast=True, max_length=MAX_TEXTS)],
    WrapValidator(_check_prompts),
    BeforeValidator(_simplified),
]


def as_prompts(prompt: Any) -> list[str | list[int | str]]:
    """Return the prompts as a list. Each prompt is a string or a list of tokens."""
    is_one = isinstance(prompt, str) or not prompt or any(isinstance(item, int) for item in prompt)
    return [prompt] if is_one else prompt


class EmbeddingsBody(GenerationBody):
    """A request for embeddings of `input`, which llama-server's clients call `content`.

    `stream` is ignored, and `dimensions` must equal the model's embedding size.
    """

    stream: Annotated[None, BeforeValidator(lambda sent: None)] = None
    input: Prompts = Field(validation_alias=AliasChoices("input", "content"))
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class CompletionBody(GenerationBody):
    prompt: Prompts
    suffix: str | None = None
    logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_TOP_LOGPROBS),
        # Some clients send `false`, as in chats. Pydantic would read it as 0 alternatives.
        BeforeValidator(lambda value: None if value is False else value),
    ] = None

    @model_validator(mode="after")
    def _check_combination(self) -> "CompletionBody":
        if self.limit == 0:
            raise ValueError("max_tokens must be at least 1")
        if len(as_prompts(self.prompt)) * (self.n or 1) > MAX_ANSWERS:
            raise ValueError(f"the number of prompts times n must not exceed {MAX_ANSWERS}")
        # vLLM's clients may send false only in chats, where the template adds special tokens.
        if (self.model_extra or {}).get("add_special_tokens") is False:
            raise ValueError("add_special_tokens must be true: no other value is supported")
        return self
