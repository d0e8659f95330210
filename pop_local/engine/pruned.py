"""How prompts are read, answers sampled, and rows given their depth afterwards."""

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from pop_local.base.errors import PopError
from pop_local.engine.decode.grammar import GrammarSampler
from pop_local.engine.decode.greedy import GreedySampler
from pop_local.engine.depth.online import OnlineRefill
from pop_local.engine.depth.power import on_battery
from pop_local.engine.depth.select import Selection, select_rows
from pop_local.engine.images.mmproj import ImageChunk
from pop_local.engine.kv_llama import KvLlama
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.llama.upstream import LlamaGrammar, api
from pop_local.engine.prefill.plan import (
    NO_ENDS,
    NOWHERE,
    Images,
    PrefillPlan,
    RowRule,
    full_rows,
    images_in,
    n_usable,
    plan_prefill,
)
from pop_local.engine.turn import TurnOptions

# The last rows of a prompt, whose attention and words choose others. Fewer of them may run deep.
N_QUESTION = 32


class PrunedLlama(KvLlama):
    """`Llama` with its own `eval`, so that what llama_cpp builds upon it prunes, too."""

    _n_asked = 0  # tokens of the prompt whose answer is sampled

    # Evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the KV cache. Several at once are a prompt, and are pruned as one.

        Raises PopError when they do not fit the context or cannot be decoded; when interrupted,
        StoppedError or whatever Ctrl-C raises. What was decoded by then stays.
        """
        if len(tokens) == 0:
            return
        self._make_room(len(tokens))
        self._requires_eval = True  # until the logits are these tokens', whatever is raised
        is_single = len(tokens) == 1 and tokens[0] >= 0
        backend.set_reading(self.ctx, not is_single or self.n_tokens < self._n_asked)
        if is_single:
            if self.online.n_rows != 0 and not on_battery():
                self.online.before(self.n_tokens)
            self._decode(tokens, Outputs.LAST, self.rule, int(self.rows.positions[self.n_tokens]))
        else:
            self._prefill(tokens)

    def skim(self, tokens: Sequence[int]) -> None:
        """Append a prompt to the KV cache as context alone: no token is full, none has logits.

        That is the least that pruning leaves to do. Raises PopError as `eval` does.
        """
        self._make_room(len(tokens))
        images = self.images_in(tokens)
        plan = plan_prefill(self.n_tokens, len(tokens), NO_ENDS, self.n_batch, images)
        backend.set_reading(self.ctx, True)
        self._read_context(tokens, plan)

    def _prefill(self, tokens: Sequence[int]) -> None:
        images = self.images_in(tokens)
        if images and images[-1][1] == len(tokens):
            raise PopError("the prompt ends with a picture", "let a question follow it")
        for start, _ in images:
            self._require_room(self.eye.image_at(tokens[start:]))
        plan = plan_prefill(self.n_tokens, len(tokens), self.rule_now, self.n_batch, images)
        self.online.end()
        self.selection = Selection()
        self._report(0, plan.n_tokens)
        if self._can_select(plan):
            self._read_selecting(tokens, plan)
        else:
            # What is past the last image is text, and a position further on each.
            full_from = self._position_after(tokens, images, plan.full_from - self.n_tokens)
            backend.set_full_from(self.ctx, full_from)
            self._read(tokens, plan, self.rule, full_from, Outputs.LAST)

    def images_in(self, tokens: Sequence[int]) -> Images:
        """Find the images of a prompt. Raises PopError for one that this model was not given."""
        return images_in(tokens, lambda rest: self.eye.image_at(rest).n_rows)

    def _require_room(self, image: ImageChunk) -> None:
        n, n_at_once = image.n_rows, min(self.n_batch, self.context_params.n_ubatch)
        if image.is_mutual and n > n_at_once:
            raise PopError(
                f"an image of {n} tokens, which see each other, does not fit a ubatch of"
                f" {n_at_once}",
                f"open the model with n_batch={n} and n_ubatch={n} at least",
            )
        if self._logits_all or self.context_params.embeddings:
            raise PopError(
                "an image has no logits and no embeddings to give",
                "open the model without logits_all and embedding",
            )

    def _position_after(self, tokens: Sequence[int], images: Images, n: int) -> int:
        """The position of the row after the next `n`, which cut no image in two."""
        lost = sum(
            end - start - self.eye.image_at(tokens[start:]).n_pos
            for start, end in images
            if end <= n
        )
        return int(self.rows.positions[self.n_tokens]) + n - lost

    def _read(
        self,
        tokens: Sequence[int],
        plan: PrefillPlan,
        rule: RowRule,
        full_from: int,
        last: Outputs,
    ) -> None:
        epoch = self.epoch
        with self.interrupt.watching(self.ctx):
            for start, end in plan.chunks:
                # llama_cpp asks for the logits of each batch's last token, which makes it full.
                outputs = last if end == plan.n_tokens else Outputs.NONE
                if tokens[start] < 0:
                    self._decode_image(self.eye.image_at(tokens[start:]), rule, full_from)
                else:
                    self._decode(tokens[start:end], outputs, rule, full_from)
                self.interrupt.check()
                if self.epoch != epoch:
                    raise DisplacedError
                self._report(end, plan.n_tokens)

    def _can_select(self, plan: PrefillPlan) -> bool:
        if not self.select or self.pop_mode is not Mode.CONTEXT:
            return False
        if self._logits_all or self.context_params.embeddings:
            return False
        return plan.n_pruned > 0 or not self.rows.is_full[: self.n_tokens].all()

    def _read_selecting(self, tokens: Sequence[int], plan: PrefillPlan) -> None:
        """Read all rows to the boundary; then sink, selected rows and tail run deep, together."""
        n_past, end = self.n_tokens, self.n_tokens + plan.n_tokens
        tail = min(plan.full_from, end - 1)
        question = min(tail, max(plan.text_from, end - N_QUESTION))
        backend.set_question(self.ctx, question)
        try:
            self._read_context(tokens, plan)
            chosen = self._select(question, tail, end)
        finally:
            backend.set_question(self.ctx, -1)
        sink = np.flatnonzero(~self.rows.is_full[: min(self.rule.sink_tokens, tail)])
        deep = [*sink.tolist(), *chosen, *range(tail, end)]
        self.deep.run(deep, logits=True)
        self.selection = Selection(len(chosen), sum(row >= n_past for row in deep))
        self._requires_eval = False

    def _read_context(self, tokens: Sequence[int], plan: PrefillPlan) -> None:
        backend.set_full_from(self.ctx, NOWHERE)
        backend.set_sink(self.ctx, 0)
        try:
            self._read(tokens, plan, NO_ENDS, NOWHERE, Outputs.NONE)
        finally:
            backend.set_sink(self.ctx, self.rule.sink_tokens)

    def _select(self, question: int, tail: int, end: int) -> list[int]:
        """Choose among the rows before the tail those that the question up to `end` needs."""
        may_be = self.rows.has_state[:tail] & ~self.rows.is_full[:tail]
        may_be[: self.rule.sink_tokens] = False
        n = round(self.select * int(may_be.sum()))
        asked = [int(token) for token in self.input_ids[question:end]]
        ordinary = [token for token in asked if self._is_ordinary(token)]
        scores = backend.get_scores(self.ctx, question)
        chosen = select_rows(scores, self.input_ids[:question], ordinary, may_be[:question], n)
        # The question's own rows come last: it is full of its own words.
        own = question + np.flatnonzero(may_be[question:])
        return [*chosen.tolist(), *own[len(own) - (n - len(chosen)) :].tolist()]

    def _is_ordinary(self, token: int) -> bool:
        attributes = api.llama_vocab_get_attr(self.vocab, token)
        return bool(attributes & api.LLAMA_TOKEN_ATTR_NORMAL)

    def _report(self, done: int, total: int) -> None:
        epoch = self.epoch
        if self._on_prefill is not None:
            self._on_prefill(done, total)
        if self.epoch != epoch:
            raise DisplacedError

    def _decode(
        self, tokens: Sequence[int], outputs: Outputs, rule: RowRule, full_from: int
    ) -> None:
        if self._logits_all or self.context_params.embeddings:
            outputs = Outputs.ALL
        start = self.n_tokens
        end = start + len(tokens)
        positions = self.rows.positions[start] + np.arange(len(tokens) + 1, dtype=np.int32)
        code = self._batch_rows.decode(self.ctx, tokens, int(positions[0]), outputs)
        if code != 0:
            self.interrupt.check()
            raise logs.not_decoded(code)
        full = self._are_full(positions[:-1], rule, full_from, outputs)
        self._have_read(tokens, positions, full, keeps_states=self.keeps_states)
        if self._logits_all and end <= len(self.scores):
            logits = api.llama_get_logits(self.ctx)
            self.scores[start:end] = np.ctypeslib.as_array(logits, (len(tokens), self._n_vocab))
        self._requires_eval = outputs is Outputs.NONE

    def _decode_image(self, image: ImageChunk, rule: RowRule, full_from: int) -> None:
        start, n = self.n_tokens, image.n_rows
        first = int(self.rows.positions[start])
        try:
            code = self.eye.decode(self.ctx, image, first, self.n_batch)
        finally:
            self.encode_s += self.eye.take_encode_s()
        if code != 0:
            self.interrupt.check()
            raise PopError(logs.first_error() or f"the image could not be read (code {code})")
        positions = first + np.arange(n + 1, dtype=np.int32)
        if self.is_mrope:
            positions[1:-1] = first
        positions[-1] = first + image.n_pos
        full = self._are_full(positions[:-1], rule, full_from, Outputs.NONE)
        # A row that has seen later ones is not what a deep pass would make of it.
        has_states = self.keeps_states and not image.is_mutual
        self._have_read(image.ids, positions, full, keeps_states=has_states)
        self._requires_eval = True

    def _are_full(
        self, positions: np.ndarray, rule: RowRule, full_from: int, outputs: Outputs
    ) -> np.ndarray:
        if self.pop_mode is Mode.CONTEXT and not self.exact:
            return full_rows(positions, rule, full_from, outputs)
        return np.full(len(positions), self.pop_mode is not Mode.ALWAYS)

    def _have_read(
        self,
        tokens: Sequence[int],
        positions: np.ndarray,
        full: np.ndarray,
        *,
        keeps_states: bool,
    ) -> None:
        start = self.n_tokens
        self.n_tokens = start + len(tokens)
        self.input_ids[start : self.n_tokens] = tokens
        self.rows.read(start, full, keeps_states=keeps_states, positions=positions)

    def _make_room(self, n_tokens: int) -> None:
        self._require_usable()
        total = self.n_tokens + n_tokens
        if total > self._n_ctx:
            larger = total + 256
            raise PopError(
                f"{total} tokens do not fit the context of {self._n_ctx}",
                f"open the model with a larger one: n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        if 0 < self.n_positions < total:
            raise PopError(
                f"{total} tokens are more than the {self.n_positions} positions of the model",
                "give a shorter text",
            )
        logs.forget_errors()
        self._forget_unfinished()

    def _require_usable(self) -> None:
        self.interrupt.require_idle()
        if os.getpid() != self._opened_by:
            raise PopError(
                "the model was opened by another process, whose threads a fork does not have",
                "open it in the process that asks it",
            )

    # Generation

    def generate(
        self, tokens: Sequence[int], *args: Any, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Sample as llama_cpp does; K/V of the prompt's beginning are reused, its tail is full."""
        self.epoch += 1
        self.selection = Selection()
        self.encode_s = 0.0
        self._sampler = None  # the last one's grammar, whose process serves the next
        tokens = list(tokens)
        self._n_asked = len(tokens)
        if options.pop("reset", True):
            tokens = self._unread(tokens)
        steps = super().generate(tokens, *args, **options | {"reset": False})
        sent = None
        try:
            while True:
                token = steps.send(sent)
                epoch = self.epoch
                sent = yield token
                if self.epoch != epoch:
                    raise DisplacedError
        except StopIteration:
            return
        finally:
            steps.close()
            self.online.end()
            self._n_asked = 0

    def _unread(self, tokens: list[int]) -> list[int]:
        """Keep what the cache has of a prompt; return the rest of it, nothing if all is done."""
        usable = self._n_usable(tokens)
        if usable == len(tokens) == self.n_tokens and not self._requires_eval:
            return []
        # Logits come with a token: where all are cached, the last one is read again.
        n_kept = min(usable, max(0, len(tokens) - 1))
        if 0 < n_kept < len(tokens) and tokens[n_kept] < 0:  # not a part of a picture
            n_kept = max(start for start, _ in self.images_in(tokens) if start <= n_kept)
        self._requires_eval = True
        if not self.truncate(n_kept):
            self.clear()
        return tokens[self.n_tokens :]

    def _n_usable(self, tokens: Sequence[int]) -> int:
        """How many cached rows a prompt may reuse.

        With a selection, no pruned ones without their states, which a saved KV cache lacks. A
        reading that was stopped before its selection left the sink pruned. Where that cannot be
        made up for, none.
        """
        usable = n_usable(tokens, self._input_ids, self.rows.is_full, self.rule)
        if self.select:
            # From there on none could be selected; of a picture none ever is.
            lost = ~(self.rows.is_full | self.rows.has_state)[:usable]
            lost &= self._input_ids[:usable] >= 0
            usable = int(lost.argmax()) if lost.any() else usable
        n_sink = min(usable, self.rule.sink_tokens)
        can_deepen = bool(self.select) and bool(self.rows.has_state[:n_sink].all())
        return usable if can_deepen or self.rows.is_full[:n_sink].all() else 0

    def sampled(
        self, tokens: Sequence[int], options: TurnOptions
    ) -> Generator[int, Sequence[int] | None, None]:
        """Sample the tokens that follow, one after the other and without end."""
        self._exchange(tokens)
        self.set_seed(api.LLAMA_DEFAULT_SEED if options.seed is None else options.seed)
        return self.generate(
            tokens,
            temp=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repeat_penalty=options.repeat_penalty,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            grammar=None if options.grammar is None else LlamaGrammar(_grammar=options.grammar),
        )

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        neutral = {
            "temp": 0.0,
            "repeat_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "logits_processor": None,
            "grammar": None,
        }
        if all(options.get(name) == value for name, value in neutral.items()):
            return GreedySampler(self._n_vocab)
        grammar = options.pop("grammar", None)
        chain = super()._init_sampler(*args, **options)
        if grammar is None:
            return chain
        return GrammarSampler(self.grammars, self._n_vocab, grammar, chain)

    # Depth, afterwards

    def refill_answers(self, n_rows: int | None) -> None:
        """Run this many pruned rows before each token of an answer, none where states are not kept.

        None: as many as slow decoding by a tenth; `online.n_rows` says how many once it is known.
        """
        self.online.end()
        self.online = OnlineRefill(self.deep, n_rows if self.keeps_states else 0)

    @property
    def n_refillable(self) -> int:
        """How many rows `refill` would make exact."""
        redo = self.rows.can_be_redone(self.n_tokens)
        return self.n_tokens - self.n_exact if redo else 0

    def refill(
        self,
        should_stop: Callable[[], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Give all cached rows their depth, in order, until the cache is the full model's.

        Returns the number of rows done, 0 where states are not kept. `should_stop` is asked while a
        chunk runs and after it (a chunk takes a second, on a device a fifth of it; one that was
        ended is done again the next time). `on_progress` gets (done_rows, total_rows).
        """
        self._require_usable()
        first, total = self.n_exact, self.n_refillable

        def advance() -> None:
            if on_progress is not None:
                on_progress(self.n_exact - first, total)

        try:
            if total:
                with self.interrupt.watching(self.ctx):
                    self.deep.refill(self.n_tokens, should_stop, advance)
        finally:
            if self.n_exact > first:
                self._requires_eval = True  # the last logits came of the rows as they were
            self._n_refilled += self.n_exact - first
        return self.n_exact - first

    def take_refilled(self) -> int:
        """How many rows were refilled since this was asked before."""
        n, self._n_refilled = self._n_refilled, 0
        return n
