"""A model that is open: its parts, how it reads prompts and answers them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.answer import Answering, Parts, answer
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.decode.constraint import Constraint, LLTokenizer, tokenizer_of
from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.decode.sampler import Allowed, Sampler
from pop_local.engine.decode.text import Pieces
from pop_local.engine.depth.refiller import Refiller
from pop_local.engine.images.mmproj import Mmproj
from pop_local.engine.images.pictures import Picture, has_pillow
from pop_local.engine.learning.online_calibrator import (
    Learned,
    OnlineCalibrator,
    default_memory,
    require_learnable,
)
from pop_local.engine.learning.store import SumsFile
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batching import shared_slots
from pop_local.engine.llama.context import Context, ContextOptions
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.llama.slot import Slot
from pop_local.engine.prefill.plan import RowRule
from pop_local.engine.prefill.read import Read
from pop_local.engine.prompt import templates
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.prompt.prompter import Prompter
from pop_local.engine.tools.triggered import Triggered
from pop_local.engine.turn import Message, TurnOptions

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenModel:
    """A model on the patched backend, which prunes while it reads prompts if it is converted.

    Its parts: `context` (llama.cpp's), `cache` (the KV cache), `prompter` (conversations to
    prompts), `refiller` (depth for pruned rows), `vision` (its mmproj, or None). `rule`: which rows
    of a prompt are full. `sequences`: `n_parallel` caches, the first of them `cache`, each with its
    refiller. A converted model starts in mode CONTEXT. Raises PopError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sidecar: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        image_tokens: int | None = None,
        keep_states: bool = False,
        **options: Any,
    ) -> None:
        """Load a model; raises PopError with llama.cpp's reason when it cannot be.

        `sidecar`: a file with POP keys and tensors for this model. `mmproj`: the file that makes
        rows of pictures, loaded with the first of them. `image_tokens`: the most that one image
        takes, where that varies.
        `keep_states`: whether rows can be refilled.
        `options` are those of ContextOptions, and fields of llama.cpp's own parameters.
        """
        backend.require_patched()
        given, self._options = ContextOptions.of(options), options
        source = read_source(Path(path))
        if "tokenizer.chat_template" in source.first.keys:
            templates.renderer.start()  # while the model is loaded
        beside = None if sidecar is None else Path(sidecar)
        meta = pop_of(source, beside)
        redoes = meta is not None and keep_states
        self.context = Context(source, meta, given, sidecar=beside, holds_states=redoes)
        self.vision: Mmproj | None = None
        if mmproj is not None:
            self.vision = Mmproj(
                Path(mmproj),
                use_gpu=given.n_gpu_layers != 0,
                max_tokens=image_tokens,
                should_stop=self.context.interrupt.is_wanted,
            )
        self.learner: OnlineCalibrator | None = None
        self.sequences = self._sequences()
        self.cache, self.refiller = self.sequences[0]
        self.prompter = Prompter(self.context, self.vision)
        self._tries: dict[frozenset[int], LLTokenizer] = {}
        self._require_template()
        self.rule = RowRule.of(self.meta)
        self.set_depth(keep_states=keep_states)

    def _sequences(self) -> tuple[tuple[KvCache, Refiller], ...]:
        n = self.context.options.n_parallel
        slots = shared_slots(self.context, n) if n > 1 else [Slot(self.context)]
        caches = [KvCache(slot, self.vision) for slot in slots]
        return tuple((cache, Refiller(cache)) for cache in caches)

    def _require_template(self) -> None:
        """Say now, not with the first question, that a template is broken."""
        if self.prompter.has_template:
            try:
                _ = self.prompter.template
            except PopError as error:
                message = f"{self.path} cannot be opened: {error.message}"
                raise PopError(message, error.hint) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; where a prompt is read, by the same thread, that is stopped first."""
        try:
            if self.learner is not None:
                self.learner.detach()
        finally:
            self.context.close()
        if self.vision is not None and self.context.is_closed:
            self.vision.close()

    # Learning

    def learn(self, memory_bytes: int | None = None) -> None:
        """Learn from all that is read in full from now on (docs/learning.md).

        `memory_bytes`: for what is kept, None for a part of what is free. Raises PopError for a
        model that cannot be pruned by fits, or computes elsewhere.
        """
        require_learnable(self.context, cannot=bool(self.exact or self.shape.no_refill))
        file = SumsFile.of(self.context.source)
        self.learner = OnlineCalibrator(
            self.cache, self.shape, file, memory_bytes or default_memory()
        )

    @property
    def learned(self) -> Learned | None:
        """The figures of what was learned so far; None where it does not learn."""
        return None if self.learner is None else self.learner.learned

    def swap_sidecar(self, sidecar: Path) -> None:
        """Prune by another sidecar from now on; a cache that is the full model's own stays.

        Raises PopError, nothing changed, and for a model that sees.
        """
        self.context.interrupt.require_idle()
        if self.vision is not None:
            raise PopError("a model that sees is not changed while it is open", "open it again")
        cache = self.cache
        state = cache.save() if 0 < cache.n_tokens == cache.n_exact else None
        opened = OpenModel(
            self.path,
            sidecar=sidecar,
            keep_states=self._wants_refill,
            **self._options,
        )
        if self.can_switch and self.mode is Mode.OFF:
            opened.set_mode(Mode.OFF)
        opened.keep_prompts(cache.prompts)
        opened.prompter.parse_special = self.prompter.parse_special
        if state is not None:
            with suppress(PopError):  # it is read again
                opened.cache.restore(state)
        opened.learner, opened._tries = self.learner, self._tries
        self.__dict__.pop("macs", None)
        # Whoever still asks the context before keeps it open, such as a server's other thread.
        self.__dict__.update(vars(opened))
        if self.learner is not None:
            self.learner.attach(self.cache)

    def keep_prompts(self, prompts: PromptCache | None) -> None:
        """Keep the states of earlier prompts there; None keeps none."""
        for cache, _ in self.sequences:
            cache.prompts = prompts

    # About the model

    def token_trie(self, shown: frozenset[int] = frozenset()) -> LLTokenizer:
        """The vocabulary for Constraint, read when it is first needed.

        `shown`: the special tokens that answers show.
        """
        if shown not in self._tries:
            self._tries[shown] = tokenizer_of(self.context, shown)
        return self._tries[shown]

    @property
    def path(self) -> Path:
        """The model's file, the first part of a split one."""
        return self.context.path

    @property
    def sidecar(self) -> Path | None:
        return self.context.sidecar

    @property
    def meta(self) -> PopMeta | None:
        """The POP keys of the file or the sidecar; None for a model that is not converted."""
        return self.context.meta

    @property
    def n_ctx(self) -> int:
        """The context in tokens."""
        return self.context.n_ctx

    @property
    def n_ctx_train(self) -> int:
        """The context in tokens that the model was trained with."""
        return int(backend.bindings().llama_model_n_ctx_train(self.context.model))

    @property
    def mmproj(self) -> Path | None:
        """The file that makes rows of pictures."""
        return self.vision.path if self.vision else None

    @property
    def can_see(self) -> bool:
        """Whether pictures can be read: there is an mmproj, and Pillow."""
        return self.vision is not None and has_pillow()

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model's layers.

        Raises UnsupportedArchitectureError for a model that cannot be pruned.
        """
        return source_shape(self.context.source)

    @cached_property
    def macs(self) -> GraphMacs:
        return GraphMacs(self.path, self.sidecar)

    @cached_property
    def recommended(self) -> dict[str, float]:
        """The fields of TurnOptions that the model's file recommends."""
        return recommended(self.context.header)

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the tokens of a text; what looks like a special token is text unless `special`.

        Raises PopError for what cannot be written as UTF-8.
        """
        return self.context.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens and parts of characters at its ends."""
        pieces = Pieces(self.context)
        return b"".join(pieces[token] for token in tokens).decode(errors="ignore")

    # Pruning

    @property
    def mode(self) -> Mode:
        return self.cache.mode

    def set_mode(self, mode: Mode) -> None:
        """Switch how prompts are read; see KvCache.set_mode."""
        for cache, _ in self.sequences:
            cache.set_mode(mode)

    @property
    def pruning(self) -> bool:
        """Whether prompts are pruned. Switching it empties the KV cache, so that no prompt is read
        half in full; switching it on raises PopError for a model that is not converted."""
        return self.mode is not Mode.OFF

    @pruning.setter
    def pruning(self, is_on: bool) -> None:
        self.set_mode(Mode.CONTEXT if is_on else Mode.OFF)

    @property
    def boundary(self) -> int:
        """The first layer that context tokens skip; 0 when there is none."""
        return self.cache.boundary

    def set_boundary(self, layer: int) -> None:
        """Prune from another layer on, own projections only; 0 goes back to the file's boundary."""
        for cache, _ in self.sequences:
            cache.set_boundary(layer)

    @property
    def exact(self) -> int:
        """The layer at which context tokens leave, exactly; 0: none, or they are pruned earlier."""
        return self.cache.exact

    @property
    def can_switch(self) -> bool:
        """Whether prompts can be read otherwise than in full."""
        return bool(self.boundary or self.exact)

    @cached_property
    def no_refill(self) -> str:
        """Why rows cannot be refilled; "" where they can, or none is pruned."""
        with suppress(PopError):
            return self.shape.no_refill
        return ""

    def set_depth(self, *, keep_states: bool = False) -> None:
        """Choose whether context rows can be refilled; no effect on a model without a boundary."""
        self.context.interrupt.require_idle()
        self._wants_refill = keep_states
        self.refills = keep_states and bool(self.boundary) and not self.no_refill
        for cache, _ in self.sequences:
            cache.keep_states(self.refills)

    @property
    def held_bytes(self) -> int:
        """Bytes held to redo rows: states at the boundary, and attention counted."""
        return backend.keep_size(self.context.ctx)

    def refill(
        self,
        should_stop: Callable[[], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Give all cached rows their depth, in order; see Refiller.refill."""
        return self.refiller.refill(should_stop, on_progress)

    # Reading and answering

    @property
    def parts(self) -> Parts:
        return Parts(self.cache, self.refiller, self.rule)

    def read(self, prompt: Prompt, on_prefill: Callable[[int, int], None] | None = None) -> Read:
        """Read a prompt into the KV cache; see prefill.read.read."""
        return self.parts.read(prompt, on_prefill)

    def sampled(self, options: TurnOptions) -> Generator[int]:
        """Sample the tokens that follow what was read, one after the other and without end."""
        return self.parts.sampled(Sampler(self.cache.slot, options, self._constraint(options)))

    def answer(self, prompt: Prompt, options: TurnOptions, parts: Parts | None = None) -> Answering:
        """Answer a prompt; the last chunk carries the figures.

        `parts`: of another sequence. Closing the iterator, or an exception in it, leaves the model
        usable. Raises PopError when the prompt does not fit the context.
        """
        return self._answer(lambda: prompt, options, parts)

    def _answer(
        self, render: Callable[[], Prompt], options: TurnOptions, parts: Parts | None = None
    ) -> Answering:
        return answer(parts or self.parts, render, options, lambda: self._constraint(options))

    def _constraint(self, options: TurnOptions) -> Allowed | None:
        grammar, calls = options.grammar, options.calls
        if calls is not None:
            pieces = Pieces(self.context, calls.shown)
            return Triggered(self.token_trie(calls.shown), pieces, calls)
        if grammar is None:
            return None
        return Constraint(
            self.token_trie(), Grammar.of_gbnf(grammar) if isinstance(grammar, str) else grammar
        )

    def chat_turn(self, messages: Sequence[Message], **options: Any) -> Answering:
        """Answer the last message, as `answer` does.

        `options` are the fields of TurnOptions, by default as the file recommends. Raises PopError
        also when the template refuses the conversation.
        """
        return self._answer(lambda: self.chat_prompt(messages), self._chosen(options))

    def ask(self, messages: Sequence[Message], **options: Any) -> Answering:
        """As chat_turn; a base model, which has no chat template, continues the messages' text.

        Pictures make it a conversation even then.
        """
        if self.prompter.has_template or any(message.pictures for message in messages):
            return self.chat_turn(messages, **options)
        return self.continue_text("\n\n".join(each.content for each in messages), **options)

    def continue_text(self, text: str, **options: Any) -> Answering:
        """Continue the text, which is the whole prompt; otherwise as chat_turn."""
        return self._answer(lambda: self.prompter.text(text), self._chosen(options))

    def _chosen(self, options: dict[str, Any]) -> TurnOptions:
        chosen: dict[str, Any] = self.recommended | options
        return TurnOptions(**chosen)

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Make the prompt of a conversation; see Prompter.conversation."""
        return self.prompter.conversation(messages)

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a conversation's prompt. Raises PopError as chat_prompt does."""
        return len(self.chat_prompt(messages))

    def count_picture(self, picture: Picture) -> int:
        """Count the tokens that a picture takes. Raises PopError as Mmproj.see does."""
        return len(self.prompter.see(picture).tokens)
