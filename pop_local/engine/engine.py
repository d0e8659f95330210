"""The parts of an open model that read prompts and generate answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.answer import Answering, answer
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.saved_states import SavedStates
from pop_local.engine.cache.sequence_settings import SequenceSettings
from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.decode.grammar_mask import Constraint, TokenTries
from pop_local.engine.decode.sampler import Sampler, recommended
from pop_local.engine.images.mmproj import Mmproj
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batching import batched_slots
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.slot import Slot
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prefill.plan import RowRule
from pop_local.engine.prompt import templates
from pop_local.engine.prompt.prompter import Prompter
from pop_local.engine.refill import Refiller
from pop_local.engine.sequence import Sequence
from pop_local.engine.tools.call_form import CallConstraint

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from pop_converter.popfile.format import PopMeta
    from pop_local.engine.decode.sampler import Allowed
    from pop_local.engine.engine_options import EngineOptions
    from pop_local.engine.prompt.prompt import Prompt
    from pop_local.engine.turn_options import TurnOptions


@dataclass(frozen=True, eq=False)
class Engine:
    """The parts of an open model.

    Pruning is on by default for converted models. `sequences`: one sequence per concurrent prompt.
    `vision`: the mmproj, if any.
    """

    options: EngineOptions
    context: Context
    sequences: tuple[Sequence, ...]
    prompter: Prompter
    vision: Mmproj | None
    token_tries: TokenTries

    @classmethod
    def open(cls, options: EngineOptions) -> Engine:
        """Load a model. Raises PopError with llama.cpp's error message if loading fails."""
        backend.require_patched()
        source = read_source(options.path)
        if "tokenizer.chat_template" in source.first.keys:
            templates.renderer.start()  # in parallel with loading the model
        meta = pop_of(source, options.sidecar)
        context = Context(
            source,
            meta,
            options.context,
            sidecar=options.sidecar,
            keeps_states=meta is not None and options.keep_states,
        )
        vision = None
        if options.mmproj is not None:
            vision = Mmproj(
                options.mmproj,
                use_gpu=options.context.n_gpu_layers != 0,
                max_tokens=options.image_tokens,
                should_stop=context.interrupt.should_stop,
            )
        prompter = Prompter(context, vision, parse_special=options.parse_special)
        if prompter.has_template:
            _ = prompter.template  # raises for a broken template
        rule, sequences = _rule(options, meta), []
        n = options.context.n_sequences
        slots: Iterable[Slot] = batched_slots(context, n) if n > 1 else [Slot(context)]
        for slot in slots:
            cache = KvCache(slot, SequenceSettings.of(slot), vision)
            states = SavedStates(cache, options.prompt_cache, vision)
            sequences.append(Sequence(states, Refiller(cache), rule))
        engine = cls(
            options, context, tuple(sequences), prompter, vision, TokenTries(context.vocabulary)
        )
        engine.set_refill(options.keep_states)
        if options.full:
            engine.set_mode(Mode.OFF)
        return engine

    def close(self) -> None:
        """Stop any read in progress and free the model."""
        self.context.close()
        if self.vision is not None and self.context.is_closed:
            self.vision.close()

    # Settings of all sequences

    def set_mode(self, mode: Mode, *, keeps_exact: bool = False) -> None:
        """Switch the prefill mode (see Sequence.set_mode)."""
        for sequence in self.sequences:
            sequence.set_mode(mode, keeps_exact=keeps_exact)

    def set_refill(self, is_on: bool) -> None:
        """Turn refilling on or off. Boundary states are stored only while refilling is on.

        The setting has no effect if the model's rows cannot be refilled.
        """
        with self.context.locked():
            self.context.interrupt.require_idle()
            for sequence in self.sequences:
                can_refill = sequence.cache.settings.boundary and not self.context.files.no_refill
                sequence.keep_states(is_on and bool(can_refill))

    # Answering

    @cached_property
    def recommended(self) -> dict[str, float]:
        """Sampling options recommended in the model's file, keyed by TurnOptions field."""
        return recommended(self.context.files.header)

    def answer(
        self,
        prompt: Prompt | Callable[[], Prompt],
        options: TurnOptions,
        sequence: Sequence | None = None,
    ) -> Answering:
        """Answer a prompt. The last chunk contains the statistics.

        `prompt`: a prompt, or a function that renders the prompt (rendering counts toward TTFT).
        `sequence`: the sequence to use (default: the first). The engine remains usable after the
        iterator is closed or raises an error. Raises PopError if the prompt exceeds the context.
        """
        render = prompt if callable(prompt) else lambda: prompt
        return answer(
            sequence or self.sequences[0], render, options, lambda: self.constraint(options)
        )

    def sampled(self, options: TurnOptions) -> Generator[int]:
        """Yield tokens indefinitely, continuing from the first sequence's cached rows."""
        n_vocab = self.context.vocabulary.n_tokens
        sampler = Sampler(n_vocab, options, self.constraint(options))
        return self.sequences[0].sampled(sampler)

    def constraint(self, options: TurnOptions) -> Allowed | None:
        """Return the constraint for the `calls` or `grammar` option (None if neither is set)."""
        grammar, calls = options.grammar, options.calls
        if calls is not None:
            pieces = Pieces(self.context.vocabulary, calls.shown)
            return CallConstraint(self.token_tries.get(calls.shown), pieces, calls)
        if grammar is None:
            return None
        parsed = Grammar.of_gbnf(grammar) if isinstance(grammar, str) else grammar
        return Constraint(self.token_tries.get(), parsed)


def _rule(options: EngineOptions, meta: PopMeta | None) -> RowRule:
    changes: dict[str, Any] = {"reuse": options.reuse} | {
        name: value
        for name in ("sink_tokens", "tail_tokens", "deep_rows")
        if (value := getattr(options, name)) is not None
    }
    return replace(RowRule.of(meta), **changes)
