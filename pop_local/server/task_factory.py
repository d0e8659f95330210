"""Convert validated request bodies into tasks for a model's worker."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pop_local.config.limits import MOST_SEED
from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import Message, ToolCall
from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.decode.grammar_mask import Constraint
from pop_local.engine.embedding import require_pooling
from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.infill import infilling
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.tools.prompts import prompt_with_tools
from pop_local.engine.tools.tool import Tool, Tools
from pop_local.engine.turn_options import TurnOptions
from pop_local.server import request_bodies as bodies
from pop_local.server.api_errors import ApiError, bad_request
from pop_local.server.request_images import parse_images
from pop_local.server.worker import Task

# OpenAI's default for text completions. Chat answers may fill the context.
COMPLETION_TOKENS = 16
# The logit bias of a forbidden token. An infinite one could leave no finite logit.
_NEVER = -1e9


class TaskFactory:
    """A factory for a model's tasks. Rejects invalid requests before they are queued.

    Multiple threads may use the factory, even while the model is decoding. `repeatable` is the
    default value of the request field `repeatable`.
    """

    def __init__(self, model: PopModel, *, repeatable: bool = False) -> None:
        self.model = model
        self._repeatable = repeatable
        settings = model.engine.sequences[0].settings
        self._is_full = settings.can_switch and settings.mode is Mode.OFF

    def chat(self, body: bodies.ChatBody) -> list[Task]:
        """Return `n` tasks for a chat, each with a different seed. Raises ApiError."""
        urls = [url for message in body.messages for _, url in message.image_urls]
        if urls and not self.model.engine.prompter.can_see:
            raise ApiError(400, "this server's model cannot read images", param="messages")
        images = parse_images(urls)
        prompter = self.model.engine.prompter
        with bad_request("messages", grammar_param="tools"):
            n_rows = 1
            for image in images:  # each image is checked before the next image is decoded
                n_rows += prompter.count_picture(image)
                self._check_length(n_rows, "messages")
            unused = iter(images)
            messages = [_message(message, unused) for message in body.messages]
            calls = None
            if body.has_tools:
                tools = _tools(body)
                prompt, calls = prompt_with_tools(prompter, messages, tools, body.answer_schema)
            else:
                prompt = prompter.conversation(
                    messages, continues=bool(body.continue_final_message)
                )
            if calls is not None:  # build the trie here, not in the worker thread
                self.model.engine.token_tries.get(calls.shown)
        self._check_length(len(prompt), "messages")
        n_top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        options = self._options(body, body.limit, n_top_logprobs)
        return self._tasks(prompt, replace(options, calls=calls, ends_repeats=True), body)

    def completions(self, body: bodies.CompletionBody) -> list[Task]:
        """Return `n` tasks for each prompt, each with a different seed. Raises ApiError."""
        prompts = self._tokens(bodies.as_prompts(body.prompt), "prompt", body.suffix)
        max_tokens = COMPLETION_TOKENS if body.limit is None else body.limit
        options = replace(self._options(body, max_tokens, body.logprobs), has_end_logprob=True)
        return [task for tokens in prompts for task in self._tasks(Prompt(tokens), options, body)]

    def embeddings(self, body: bodies.EmbeddingsBody) -> list[Task]:
        if body.dimensions not in (None, n_embd := self.model.engine.context.files.n_embd):
            message = f"dimensions must be {n_embd}: embeddings cannot be shortened"
            raise ApiError(400, message, param="dimensions")
        with bad_request():
            require_pooling(self.model.engine.sequences[0].cache)
        # An empty string has no rows to embed, so a space replaces it.
        texts = [text if text != "" else " " for text in bodies.as_prompts(body.input)]
        prompts = map(Prompt, self._tokens(texts, "input"))
        reason = "embeddings require all layers"
        return [Task(prompt, TurnOptions(), reason, embeds=True) for prompt in prompts]

    def _tasks(
        self, prompt: Prompt, options: TurnOptions, body: bodies.GenerationBody
    ) -> list[Task]:
        """Return `n` tasks for a prompt. If the request has a seed, they use consecutive seeds."""
        task = Task(
            prompt,
            options,
            self._full_reason(body.pop),
            reports=bool(body.stream and body.return_progress),
            alone=self._is_alone(body),
        )
        n, seed = body.n or 1, options.seed
        if seed is None:
            return [task] * n
        seeds = [(seed + number) % (MOST_SEED + 1) for number in range(n)]
        return [replace(task, options=replace(options, seed=value)) for value in seeds]

    def _full_reason(self, pop: bool | None) -> str | None:
        """Return the reason for a full read, or None if the prompt is pruned. Raises ApiError."""
        if not self.model.engine.sequences[0].settings.can_switch:
            no_keys = "the model has no pruning keys"
            if pop:
                raise ApiError(400, f'"pop" cannot be true because {no_keys}', param="pop")
            return no_keys
        if pop is None and self._is_full:
            return "the server was started with --full"
        return "the request disables pruning" if pop is False else None

    def _tokens(
        self, prompts: Sequence[str | list[int | str]], param: str, suffix: str | None = None
    ) -> list[list[int]]:
        """Return each prompt's tokens.

        Raises ApiError if a token is unknown, or if a prompt is empty or too long for the context.
        """
        split = self.model.engine.context.vocabulary.tokenize

        def tokenize(part: int | str, at: int) -> list[int]:
            if isinstance(part, int):
                return [part]
            return split(part, add_bos=not (at or suffix), special=True)

        rows: list[list[int]] = []
        for prompt in prompts:
            parts = [prompt] if isinstance(prompt, str) else prompt
            self.check_tokens([part for part in parts if isinstance(part, int)], param)
            tokens = [token for at, part in enumerate(parts) for token in tokenize(part, at)]
            if suffix:
                prefix = prompt if isinstance(prompt, str) else tokens
                with bad_request("suffix"):
                    tokens = infilling(self.model.engine.context, prefix, suffix)
            self._check_length(len(tokens), param)
            rows.append(tokens)
        return rows

    def text(self, tokens: Sequence[int]) -> str:
        context = self.model.engine.context
        pieces = Pieces(context.vocabulary, range(context.vocabulary.n_tokens))
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    def rendered(self, prompt: Prompt) -> str:
        """Return a prompt's text without the beginning-of-sequence token."""
        vocabulary = self.model.engine.context.vocabulary
        tokens = [token for token in prompt.tokens if token >= 0]  # images have no text
        n_bos = len(vocabulary.bos) if tokens[:1] == list(vocabulary.bos) else 0
        # SentencePiece adds a space at the start of a string.
        added = self.text(vocabulary.tokenize("a")).removesuffix("a")
        return self.text(tokens[n_bos:]).removeprefix(added)

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raise ApiError if any token is outside the vocabulary."""
        n_vocab = self.model.engine.context.vocabulary.n_tokens
        if any(not 0 <= token < n_vocab for token in tokens):
            raise ApiError(400, f"token IDs must be between 0 and {n_vocab - 1}", param=param)

    def _check_length(self, n_prompt: int, param: str) -> None:
        context, larger = self.model.engine.context, n_prompt + 256
        if n_prompt == 0:
            raise ApiError(400, "the prompt is empty", param=param)
        if n_prompt >= context.n_ctx:
            hint = f"shorten the prompt, or restart the server with --ctx {larger}"
            if 0 < context.files.n_ctx_train < larger:
                hint = context.files.untrained_hint
            message = (
                f"the context is too small: the prompt has {n_prompt} tokens, but the prompt"
                f" and the answer together are limited to {context.n_ctx}; {hint}"
            )
            error = ApiError(400, message, code="context_length_exceeded", param=param)
            error.figures = {"n_prompt_tokens": n_prompt, "n_ctx": context.n_ctx}
            raise error

    def _options(
        self, body: bodies.GenerationBody, max_tokens: int | None, n_top_logprobs: int | None
    ) -> TurnOptions:
        """Return a request's options. Omitted options keep the model's or the engine's defaults."""
        sampling = body.model_dump(include=set(SAMPLER_OPTIONS), exclude_none=True)
        return TurnOptions(
            max_tokens=max_tokens,
            stops=tuple(body.stop or ()),
            grammar=self._grammar(body),
            logit_bias=self._logit_bias(body),
            n_top_logprobs=n_top_logprobs,
            repeatable=self._is_alone(body) or body.cache_prompt is False,
            **{**self.model.engine.recommended, **sampling},
        )

    def _is_alone(self, body: bodies.GenerationBody) -> bool:
        return self._repeatable if body.repeatable is None else body.repeatable

    def _logit_bias(self, body: bodies.GenerationBody) -> tuple[tuple[int, float], ...]:
        """Return (token, bias) pairs. A string's bias applies to each of its tokens."""
        biases: list[tuple[int, float]] = []
        for key, sent in body.logit_bias or ():
            split = self.model.engine.context.vocabulary.tokenize
            tokens = split(key) if isinstance(key, str) else [key]
            self.check_tokens(tokens, "logit_bias")
            biases += [(token, _NEVER if sent is False else sent) for token in tokens]
        return tuple(biases)

    def _grammar(self, body: bodies.GenerationBody) -> Grammar | None:
        schema = body.answer_schema
        if schema is None and body.grammar is None:
            return None
        with bad_request("grammar" if schema is None else "response_format"):
            gbnf = body.grammar or ""
            grammar = Grammar.of_gbnf(gbnf) if schema is None else Grammar.of_schema(schema)
            Constraint(self.model.engine.token_tries.get(), grammar).allowed()
        return grammar


def _message(message: bodies.ChatMessage, images: Iterator[Picture]) -> Message:
    role = "system" if message.role == "developer" else message.role
    pictures = tuple((offset, next(images)) for offset, _ in message.image_urls)
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    return Message(role, message.text, pictures, calls, message.tool_call_id)


def _tools(body: bodies.ChatBody) -> Tools:
    """Return the tools to list in the prompt and those that the model may call."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        return Tools((), ())
    functions = [tool.function for tool in body.tools]
    listed = tuple(
        Tool(function.name, function.description or "", function.parameters or {})
        for function in functions
    )
    callable_ = listed
    must_call = choice not in (None, "auto")
    allowed = [choice] if isinstance(choice, bodies.NamedToolChoice) else []
    if isinstance(choice, bodies.AllowedToolsChoice):
        allowed = choice.allowed_tools.tools
        must_call = choice.allowed_tools.mode == "required"
    if names := {tool.function.name for tool in allowed}:
        if missing := names.difference(tool.name for tool in listed):
            message = f"tool_choice names {min(missing)!r}, which is not in tools"
            raise ApiError(400, message, param="tool_choice")
        callable_ = tuple(tool for tool in listed if tool.name in names)
    # A small model that must call a tool would otherwise keep calling tools.
    several = not must_call if body.parallel_tool_calls is None else body.parallel_tool_calls
    return Tools(listed, callable_, must_call, several)
