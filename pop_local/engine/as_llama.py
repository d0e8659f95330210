"""A llama_cpp.Llama that asks a PopModel, for LangChain and others that want that class.

It is llama_cpp's own object without a model of its own. Reading and sampling are ours, so prompts
are pruned and cached as ever; completions, streaming and stop strings are llama_cpp's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import llama_cpp
from llama_cpp import _internals as internals
from llama_cpp import llama_chat_format as chat_format

from pop_converter.base.errors import PopError
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn import TurnOptions

if TYPE_CHECKING:
    from pop_local.engine.llama.context import Context
    from pop_local.engine.open_model import OpenModel

_N_PENALISED = 64


def as_llama(model: OpenModel) -> llama_cpp.Llama:
    """Return a Llama on an open model, which must outlive it.

    It has completions, chats, tokens and the sizes of the model; not its embeddings, states, draft
    models and logits of all tokens.
    """
    context = model.context
    native, ctx = object.__new__(_Model), object.__new__(_Context)
    for each in (native, ctx):  # whose pointers are not theirs to free
        vars(each).update(
            _exit_stack=ExitStack(), sampler=None, custom_samplers=[], context=context
        )
    metadata = native.metadata()  # an error, where the model is closed
    llama = object.__new__(llama_cpp.Llama)
    vars(llama).update(
        _stack=ExitStack(),
        _model=native,
        _ctx=ctx,
        verbose=False,
        model_path=str(context.path),
        metadata=metadata,
        context_params=context.settings,
        n_batch=context.n_batch,
        n_threads=context.n_threads,
        last_n_tokens_size=_N_PENALISED,
        input_ids=model.cache.tokens,
        n_tokens=0,
        cache=None,
        draft_model=None,
        spm_infill=False,
        chat_format="pop-local",
        chat_handler=None,
        _chat_handlers={"pop-local": _chat_handler(model)},
        _seed=llama_cpp.LLAMA_DEFAULT_SEED,
        _logits_all=False,
        _n_ctx=context.n_ctx,
        _n_vocab=context.n_vocab,
        _token_nl=native.token_nl(),
        _token_eos=native.token_eos(),
        generate=partial(_generate, model, llama),
        create_chat_completion=partial(_create_chat_completion, model, llama),
    )
    llama.tokenizer_ = llama_cpp.LlamaTokenizer(llama)
    return llama


class _Model(internals.LlamaModel):
    """The model of an open context; its pointers raise PopError once that is closed."""

    context: Context

    @property
    def model(self) -> Any:
        return self.context.model

    @property
    def vocab(self) -> Any:
        return self.context.vocab


class _Context(internals.LlamaContext):
    """An open context, in the same way."""

    context: Context

    @property
    def ctx(self) -> Any:
        return self.context.ctx


def _generate(
    model: OpenModel,
    llama: Any,
    tokens: Sequence[int],
    *,
    stopping_criteria: Any = None,
    grammar: Any = None,
    reset: bool = True,
    temp: float = 0.8,
    logits_processor: Any = None,
    **options: Any,
) -> Iterator[int]:
    """As Llama.generate; for what ours do not know the sampler is llama_cpp's own.

    Raises PopError for these (`logits_processor`, mirostat, `typical_p`) along with a grammar.
    """
    if not reset:
        raise PopError("generate goes on from what was read by itself", "leave reset out")
    is_foreign = logits_processor or options.get("mirostat_mode")
    is_foreign = is_foreign or options.get("typical_p", 1.0) != 1.0
    if grammar is not None and is_foreign:
        raise PopError(
            "logits_processor, logit_bias, mirostat and typical_p do not go with a grammar",
            "leave one of them out",
        )
    model.read(Prompt(list(tokens)))
    if is_foreign:
        chain = llama._init_sampler(temp=temp, logits_processor=logits_processor, **options)
        steps = model.parts.sampled(_Chain(model, llama, chain))
    else:
        known = TurnOptions.__dataclass_fields__.keys() & options.keys()
        chosen = {name: options[name] for name in known}
        form = getattr(grammar, "_grammar", grammar)  # llama_cpp's has GBNF in it
        seed = llama._seed
        steps = model.sampled(TurnOptions(temperature=temp, grammar=form, seed=seed, **chosen))
    for token in steps:
        _show_tokens(model, llama)
        if stopping_criteria is not None and stopping_criteria(llama.input_ids, None):
            return
        yield token


class _Chain:
    """A sampler of llama_cpp, called as ours are."""

    def __init__(self, model: OpenModel, llama: Any, chain: Any) -> None:
        self._model, self._llama, self._chain = model, llama, chain

    def sample(self) -> int:
        _show_tokens(self._model, self._llama)  # which a logits_processor is given
        return int(self._chain.sample(self._llama._ctx, -1))

    def close(self) -> None:
        self._chain.close()


def _show_tokens(model: OpenModel, llama: Any) -> None:
    llama.input_ids, llama.n_tokens = model.cache.tokens, model.cache.n_tokens


def _chat_handler(model: OpenModel) -> Any:
    def render(*, messages: list[Any], **tools: Any) -> chat_format.ChatFormatterResponse:
        return chat_format.ChatFormatterResponse(
            prompt=model.prompter.template.render(messages, tools), added_special=True
        )

    return chat_format.chat_formatter_to_chat_completion_handler(render)


def _create_chat_completion(model: OpenModel, llama: Any, *given: Any, **options: Any) -> Any:
    """As Llama's, with this library's grammars of JSON schemas, as the server's.

    Raises GrammarError for a response_format that an answer cannot be kept to, and PopError for
    pictures, which llama_cpp's own chat would drop or invent.
    """
    messages = options.get("messages") or (given[0] if given else [])
    if any(_has_pictures(message.get("content")) for message in messages):
        raise PopError(
            "llama_cpp's own chat shows the model no pictures",
            "ask the model itself: chat(..., images=[...])",
        )
    schema = _schema_of(options.get("response_format") or {})
    if schema is not None:
        # llama_cpp's own let raw line ends into strings, and take no json_schema.
        options["response_format"] = None
        options["grammar"] = grammar = Grammar.of_schema(schema)
        if grammar.ignored:
            what = ", ".join(grammar.ignored)
            warnings.warn(f"not enforced of the JSON schema: {what}", stacklevel=3)
    return llama_cpp.Llama.create_chat_completion(llama, *given, **options)


def _has_pictures(content: Any) -> bool:
    return isinstance(content, list) and any(part.get("type") != "text" for part in content)


def _schema_of(form: dict[str, Any]) -> Any:
    """The JSON schema that a response_format asks for, None for any text."""
    match form.get("type", "text"), form:
        case "text", _:
            return None
        case "json_object", _:
            return form.get("schema") or {"type": "object"}
        case "json_schema", {"json_schema": {"schema": schema}}:
            return schema
    raise GrammarError(f"there is no response_format like {form}")
