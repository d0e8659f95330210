"""From a prompt to an answer: pieces of text as they are sampled, then the figures."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from pop_local.base.errors import PopError, StoppedError
from pop_local.engine.decode.text import Pieces, TextStream
from pop_local.engine.llama import backend
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.logprobs import Logprobs
from pop_local.engine.prefill.plan import plan_prefill, text_from
from pop_local.engine.prompts import Prompt
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.turn import (
    Chunk,
    ContextFullError,
    FinishReason,
    TurnOptions,
    TurnStats,
)

# Closing it ends the answer.
Answering = Generator[Chunk, None, None]


def answer(model: PrunedLlama, render: Callable[[], Prompt], options: TurnOptions) -> Answering:
    """Stream the answer to a prompt; the last chunk carries the figures."""
    with closing(_Turn(model, render, options)) as turn:
        yield from turn.chunks()


class _Turn:
    """One answer while it comes into being; time starts with the object."""

    def __init__(
        self, model: PrunedLlama, render: Callable[[], Prompt], options: TurnOptions
    ) -> None:
        self._started_s = time.perf_counter()
        if options.max_tokens is not None and options.max_tokens < 1:
            raise PopError(
                f"max_tokens is {options.max_tokens}: an answer has one token at least",
                "give 1 or more, or None for as many as the context holds",
            )
        stops: object = options.stops
        if isinstance(stops, str):  # a sequence of letters, to Python
            raise PopError("stops is a single text, not several", f"stops=({stops!r},)")
        prompt = render()
        self._model = model
        self._options = options
        self._seen = prompt.seen
        self._n_prompt = len(prompt.tokens)
        self._n_image = prompt.n_image
        self._text_from = text_from(prompt.tokens)
        self._begun = prompt.begun
        room = model.n_ctx() - self._n_prompt
        if room < options.min_answer:
            raise ContextFullError(self._n_prompt, options.min_answer, model.n_ctx())
        self._limit = min(options.max_tokens or room, room)
        self._text = TextStream((*prompt.stops, *options.stops))
        self._pieces = Pieces(model.vocab)
        n_top = options.n_top_logprobs
        self._logprobs = None if n_top is None else Logprobs(model, n_top)
        self._n_shown = 0
        self._sampled = model.sampled(prompt.tokens, options)
        self._n_decoded = 0
        self._decode_s = 0.0

    def close(self) -> None:
        self._sampled.close()

    def chunks(self) -> Iterator[Chunk]:
        backend.reset_counters(self._model.ctx)
        self._n_refilled = self._model.take_refilled()
        prefill_started_s = time.perf_counter()
        should_stop = self._options.should_stop
        try:
            with self._model.watching_prefill(self._options.on_prefill, should_stop):
                token = next(self._sampled)
        except StoppedError:
            if should_stop is None:  # whoever watches the model stops more than this answer
                raise
            token = -1
        self._epoch = self._model.epoch
        now_s = time.perf_counter()
        self._ttft_s, self._encode_s = now_s - self._started_s, self._model.encode_s
        self._prefill_s = now_s - prefill_started_s - self._encode_s
        self._evaluated = backend.get_counters(self._model.ctx)
        self._selection = self._model.selection
        self._n_exact = self._model.n_exact
        n_evaluated = self._evaluated.n_rows
        # A batch that was stopped has been counted in part, and dropped.
        self._n_cached = max(0, self._model.n_tokens - n_evaluated)
        if token == -1:
            yield Chunk("", self._stats("interrupted"))
            return
        if self._begun and self._options.grammar is None:  # a form has no room for it
            yield Chunk(self._begun)
        yield from self._decode(token)

    def _decode(self, token: int) -> Iterator[Chunk]:
        while True:
            self._n_decoded += 1
            at_end = self._is_end(token)
            shown = "" if at_end else self._text.push(self._pieces[token])
            if self._logprobs is not None and (not at_end or self._options.has_end_logprob):
                self._logprobs.push(token)
            reason = "stop" if at_end or self._text.stopped else self._cut_short()
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
        # Last tokens without text begin where it ends; with a stop string they are cut off.
        is_whole = stats is not None and not self._text.stopped
        return Chunk(text, stats, self._logprobs.take(self._n_shown + is_whole))

    def _next_token(self) -> int:
        if self._model.epoch != self._epoch:
            raise DisplacedError
        started_s = time.perf_counter()
        token = next(self._sampled)
        self._decode_s += time.perf_counter() - started_s
        return token

    def _is_end(self, token: int) -> bool:
        return bool(backend.bindings().llama_vocab_is_eog(self._model.vocab, token))

    def _cut_short(self) -> FinishReason | None:
        if self._n_decoded >= self._limit:
            return "length"
        if self._options.should_stop is not None and self._options.should_stop():
            return "interrupted"
        return None

    def _stats(self, reason: FinishReason) -> TurnStats:
        return TurnStats(
            n_prompt=self._n_prompt,
            n_cached=self._n_cached,
            n_pruned=self._evaluated.n_context - self._selection.n_deep,
            n_selected=self._selection.n_selected,
            n_refilled=self._n_refilled,
            n_exact=self._n_exact,
            n_skipped_exact=self._evaluated.n_exact,
            exact_layer=self._model.exact,
            n_full=self._evaluated.n_full + self._selection.n_deep,
            ttft_s=self._ttft_s,
            prefill_s=self._prefill_s,
            n_decoded=self._n_decoded,
            decode_s=self._decode_s,
            finish_reason=reason,
            n_image=self._n_image,
            encode_s=self._encode_s,
            is_short=self._is_short(),
        )

    def _is_short(self) -> bool:
        model = self._model
        if model.exact:
            return False
        n_new = max(1, self._n_prompt - self._n_cached)
        n_shown = self._text_from - self._n_cached
        images = [(0, n_shown)] if n_shown > 0 else ()
        plan = plan_prefill(self._n_cached, n_new, model.rule, model.n_batch, images)
        return model.pop_mode is backend.Mode.CONTEXT and plan.n_pruned == 0
