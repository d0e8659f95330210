"""Answer a prompt: yield text while tokens are sampled, then statistics."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

from pop_converter.base.errors import PopError
from pop_converter.popfile.format import PopMeta
from pop_local.engine.chat_messages import Chunk, FinishReason, TurnStats
from pop_local.engine.context_full import ContextFullError
from pop_local.engine.decode.logprobs import Logprobs
from pop_local.engine.decode.repeats import Repeats
from pop_local.engine.decode.sampler import Allowed, Sampler
from pop_local.engine.decode.text import TextStream
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prefill.plan import Reuse
from pop_local.engine.prefill.reading import PrefillStoppedError
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import CachedSequence
from pop_local.engine.tools.call_form import CallConstraint
from pop_local.engine.turn_options import TurnOptions

# The caller closes the generator to end the answer.
Answering = Generator[Chunk, None, None]


def answer(
    sequence: CachedSequence,
    render: Callable[[], Prompt],
    options: TurnOptions,
    constraint: Callable[[], Allowed | None] = lambda: None,
) -> Answering:
    """Stream the answer to a prompt; the last chunk contains the statistics."""
    if options.repeatable:
        sequence = replace(sequence, rule=replace(sequence.rule, reuse=Reuse.OFF))
    with closing(_Turn(sequence, render, options, constraint)) as turn:
        yield from turn.chunks()


class _Turn:
    """An answer in progress. The constructor starts the clock."""

    def __init__(
        self,
        sequence: CachedSequence,
        render: Callable[[], Prompt],
        options: TurnOptions,
        constraint: Callable[[], Allowed | None],
    ) -> None:
        self._started_s = time.perf_counter()
        if options.max_tokens is not None and options.max_tokens < 1:
            raise PopError(
                f"max_tokens is {options.max_tokens}: the minimum is 1",
                "use max_tokens=1 or more, or None to fill the context",
            )
        stops: object = options.stops
        if isinstance(stops, str):  # a tuple of its characters would be wrong
            raise PopError("stops is a string, not a tuple", f"use stops=({stops!r},)")
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
        self._sampler = Sampler(sequence.cache.slot, options, self._constraint)
        self._sampled: Generator[int] | None = None
        self._n_decoded = 0
        self._decode_s = 0.0

    def close(self) -> None:
        if self._sampled is not None:
            self._sampled.close()
        self._sampler.close()

    def chunks(self) -> Iterator[Chunk]:
        options = self._options
        self._n_refilled = self._sequence.refiller.take_refilled()
        prefill_started_s = time.perf_counter()
        try:
            with stopped_by(options.should_stop):
                found = self._sequence.read(self._prompt, options.on_prefill)
                self._sampled = self._sequence.sampled(self._sampler)
                token = next(self._sampled)
        except PrefillStoppedError as error:
            if options.should_stop is None:  # stopped from outside, not by this answer's options
                raise
            found, token = error.read, -1
        now_s = time.perf_counter()
        self._read, self._ttft_s = found, now_s - self._started_s
        self._prefill_s = now_s - prefill_started_s - found.encode_s
        if token == -1:
            yield Chunk("", self._stats("interrupted"))
            return
        if self._prompt.begun and options.grammar is None:  # no grammar allows the prefix
            yield Chunk(self._prompt.begun)
        yield from self._decode(token)

    def _decode(self, token: int) -> Iterator[Chunk]:
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
            is_over = at_end or self._text.stop or self._is_repeating
            reason = "stop" if is_over else self._limit_reason()
            if reason is not None:
                yield self._chunk(shown + self._text.flush(), self._stats(reason))
                return
            if shown:
                yield self._chunk(shown)
            token = self._next_token()

    def _chunk(self, text: str, stats: TurnStats | None = None) -> Chunk:
        if self._logprobs is None:
            return Chunk(text, stats)
        self._n_shown += len(text.encode())
        # The last chunk includes tokens without text, and tokens of half a character.
        is_whole = stats is not None and not self._text.stop
        return Chunk(text, stats, self._logprobs.take(math.inf if is_whole else self._n_shown))

    def _next_token(self) -> int:
        assert self._sampled is not None, "chunks() has created the generator"
        started_s = time.perf_counter()
        token = next(self._sampled)
        self._decode_s += time.perf_counter() - started_s
        return token

    def _limit_reason(self) -> FinishReason | None:
        if self._n_decoded >= self._limit:
            return "length"
        if self._options.should_stop is not None and self._options.should_stop():
            return "interrupted"
        return None

    def _stats(self, reason: FinishReason) -> TurnStats:
        found = self._read
        counters = found.counters
        return TurnStats(
            n_prompt=len(self._prompt),
            n_cached=found.n_cached,
            n_pruned=counters.n_context,
            n_deep=counters.n_deep,
            n_refilled=self._n_refilled,
            n_exact=found.n_exact,
            n_stale=found.n_stale,
            n_skipped_exact=counters.n_exact,
            exact_layer=self._sequence.cache.pruning.exact,
            n_full=counters.n_full,
            ttft_s=self._ttft_s,
            prefill_s=self._prefill_s,
            n_decoded=self._n_decoded,
            decode_s=self._decode_s,
            finish_reason=reason,
            n_image=self._prompt.n_image,
            encode_s=found.encode_s,
            is_short=found.is_short,
            fit=_fit(self._context.files.meta) if counters.n_context else "",
            stop=self._text.stop,
            is_repeating=self._is_repeating,
        )


def _fit(meta: PopMeta | None) -> str:
    """Return the name and length of the text that the projections were fitted on."""
    if meta is None or meta.calibration is None:
        return "the model's own projections"
    return f"{meta.calibration.name}, {meta.calibration.n_tokens:,} tokens"
