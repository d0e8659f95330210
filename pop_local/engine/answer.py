"""Stream the answer to a prompt, followed by its statistics."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

from pop_base.errors import PopError
from pop_converter.popfile.format import PopMeta
from pop_local.engine.chat_messages import Chunk, FinishReason, TurnStats
from pop_local.engine.decode.logprobs import Logprobs
from pop_local.engine.decode.repeats import Repeats
from pop_local.engine.decode.sampler import Allowed, Sampler
from pop_local.engine.decode.text import TextStream
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prefill.plan import Reuse
from pop_local.engine.prefill.reading import PrefillStoppedError
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import Sequence
from pop_local.engine.tools.call_form import CallConstraint
from pop_local.engine.turn_options import TurnOptions

# Closing the generator ends the answer.
Answering = Generator[Chunk, None, None]


class ContextFullError(PopError):
    """Error raised when a prompt and its answer exceed the context. All counts are in tokens.

    `n_answer`: tokens reserved for the answer. `n_short`: the number of tokens that do not fit.
    """

    def __init__(self, n_prompt: int, n_answer: int, n_ctx: int) -> None:
        larger = n_prompt + max(512, n_answer)
        super().__init__(
            f"the prompt has {n_prompt:,} tokens, which is {n_prompt + n_answer - n_ctx:,} too many"
            f" (the context holds {n_ctx:,} tokens, and the answer needs {n_answer:,})",
            f"open the model with a larger context (n_ctx={larger}), or shorten the prompt",
            cause="context-full",
            n_ctx=larger,
        )
        self.n_prompt = n_prompt
        self.n_answer = n_answer
        self.n_ctx = n_ctx

    @property
    def n_short(self) -> int:
        return self.n_prompt + self.n_answer - self.n_ctx


def answer(
    sequence: Sequence,
    render: Callable[[], Prompt],
    options: TurnOptions,
    constraint: Callable[[], Allowed | None] = lambda: None,
) -> Answering:
    """Stream the answer to a prompt. The last chunk contains the statistics."""
    if options.repeatable:
        sequence = replace(sequence, rule=replace(sequence.rule, reuse=Reuse.OFF))
    lock = sequence.cache.context.locked
    with lock():
        chunks = _Turn(sequence, render, options, constraint).chunks()
    with closing(chunks):
        while True:
            # The caller may never continue an answer, so a paused answer holds no lock.
            with lock():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


class _Turn:
    """An answer in progress. The constructor starts timing the answer."""

    def __init__(
        self,
        sequence: Sequence,
        render: Callable[[], Prompt],
        options: TurnOptions,
        constraint: Callable[[], Allowed | None],
    ) -> None:
        self._started_s = time.perf_counter()
        if options.max_tokens is not None and options.max_tokens < 1:
            raise PopError(
                f"max_tokens is {options.max_tokens}, but the minimum is 1",
                "set max_tokens to 1 or more, or to None to fill the context",
            )
        stops: object = options.stops
        if isinstance(stops, str):  # tuple() would split it into characters
            raise PopError("stops must be a tuple, not a string", f"use stops=({stops!r},)")
        self._sequence = sequence
        self._options = options
        with stopped_by(options.should_stop):
            self._prompt = prompt = render()
        context = self._context = sequence.cache.context
        room = context.n_ctx - len(prompt)
        if room < options.min_answer:
            raise ContextFullError(len(prompt), options.min_answer, context.n_ctx)
        self._limit = min(options.max_tokens or room, room)
        self._text = TextStream((*prompt.stops, *options.stops))
        self._pieces = Pieces(context.vocabulary, options.calls.shown if options.calls else ())
        n_top = options.n_top_logprobs
        self._logprobs = None if n_top is None else Logprobs(sequence.cache.slot, n_top)
        has_form = options.grammar is not None
        self._repeats = Repeats() if options.ends_repeats and not has_form else None
        self._is_repeating = False
        self._n_shown = 0
        self._constraint = constraint()
        self._sampler = Sampler(context.vocabulary.n_tokens, options, self._constraint)
        self._n_decoded = 0
        self._decode_s = 0.0

    def chunks(self) -> Answering:
        options = self._options
        self._n_refilled = self._sequence.refiller.take_refilled()
        prefill_started_s = time.perf_counter()
        with closing(self._sampler), closing(self._sequence.sampled(self._sampler)) as sampled:
            try:
                with stopped_by(options.should_stop):
                    self._read = self._sequence.read(self._prompt, options.on_prefill)
                    token = next(sampled)
            except PrefillStoppedError as error:
                if options.should_stop is None:  # another caller's `should_stop` returned True
                    raise
                self._read, token = error.read, -1
            now_s = time.perf_counter()
            self._ttft_s = now_s - self._started_s
            self._prefill_s = now_s - prefill_started_s - self._read.encode_s
            if token == -1:
                yield Chunk("", self._stats("interrupted"))
                return
            if self._prompt.begun and options.grammar is None:  # no grammar allows the prefix
                yield Chunk(self._prompt.begun)
            yield from self._decode(token, sampled)

    def _decode(self, token: int, sampled: Iterator[int]) -> Iterator[Chunk]:
        should_stop = self._options.should_stop
        while True:
            self._n_decoded += 1
            at_end = self._context.vocabulary.is_end(token)
            piece = b"" if at_end else self._pieces[token]
            if isinstance(self._constraint, CallConstraint) and self._constraint.is_calling:
                # A call's arguments may contain stop strings and repetitions.
                self._text.ignore_stops()
                self._repeats = None
            shown = self._text.push(piece)
            self._is_repeating = self._repeats is not None and self._repeats.push(token, piece)
            if self._logprobs is not None and (not at_end or self._options.has_end_logprob):
                self._logprobs.push(token)
            reason: FinishReason | None = None
            if at_end or self._text.stop or self._is_repeating:
                reason = "stop"
            elif self._n_decoded >= self._limit:
                reason = "length"
            elif should_stop is not None and should_stop():
                reason = "interrupted"
            if reason is not None:
                yield self._chunk(shown + self._text.flush(), self._stats(reason))
                return
            if shown:
                yield self._chunk(shown)
            started_s = time.perf_counter()
            token = next(sampled)
            self._decode_s += time.perf_counter() - started_s

    def _chunk(self, text: str, stats: TurnStats | None = None) -> Chunk:
        if self._logprobs is None:
            return Chunk(text, stats)
        self._n_shown += len(text.encode())
        # The last chunk includes tokens that have no text or only an incomplete character.
        is_whole = stats is not None and not self._text.stop
        return Chunk(text, stats, self._logprobs.take(math.inf if is_whole else self._n_shown))

    def _stats(self, reason: FinishReason) -> TurnStats:
        read = self._read
        counters = read.counters
        return TurnStats(
            n_prompt=len(self._prompt),
            n_cached=read.n_cached,
            n_pruned=counters.n_context,
            n_deep=counters.n_deep,
            n_refilled=self._n_refilled,
            n_exact=read.n_exact,
            n_stale=read.n_stale,
            n_skipped_exact=counters.n_exact,
            exact_layer=self._sequence.cache.settings.exact,
            n_full=counters.n_full,
            ttft_s=self._ttft_s,
            prefill_s=self._prefill_s,
            n_decoded=self._n_decoded,
            decode_s=self._decode_s,
            finish_reason=reason,
            n_image=self._prompt.n_image,
            encode_s=read.encode_s,
            is_short=read.is_short,
            fit=_fit(self._context.files.meta) if counters.n_context else "",
            stop=self._text.stop,
            is_repeating=self._is_repeating,
        )


def _fit(meta: PopMeta | None) -> str:
    """Return the name and length of the text used to fit the projections."""
    if meta is None or meta.calibration is None:
        return "the model's own projections"
    return f"{meta.calibration.name}, {meta.calibration.n_tokens:,} tokens"
