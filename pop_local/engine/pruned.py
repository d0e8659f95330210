"""How prompts are read, answers sampled, and rows given their depth afterwards."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from converter.errors import PopError
from pop_local.engine.decode.grammar import GrammarSampler
from pop_local.engine.decode.greedy import GreedySampler
from pop_local.engine.depth.online import OnlineRefill
from pop_local.engine.depth.select import Selection, select_rows
from pop_local.engine.kv_llama import KvLlama
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.llama.upstream import LlamaGrammar, api
from pop_local.engine.prefill.plan import (
    NO_ENDS,
    NOWHERE,
    PrefillPlan,
    RowRule,
    full_rows,
    n_usable,
    plan_prefill,
)
from pop_local.engine.turn import TurnOptions

# The last rows of a prompt, whose attention and words choose others. Fewer of them may run deep.
N_QUESTION = 32


class PrunedLlama(KvLlama):
    """`Llama` with its own `eval`, so that what llama_cpp builds upon it prunes, too."""

    # Evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the KV cache. Several at once are a prompt, and are pruned as one.

        Raises PopError when they do not fit the context or cannot be decoded; when interrupted,
        StoppedError or whatever Ctrl-C raises. What was decoded by then stays.
        """
        if len(tokens) == 0:
            return
        self._make_room(len(tokens))
        if len(tokens) == 1:
            self.online.before(self.n_tokens)
            self._decode(tokens, Outputs.LAST, self.rule, self.n_tokens)
        else:
            self._prefill(tokens)

    def _prefill(self, tokens: Sequence[int]) -> None:
        plan = plan_prefill(self.n_tokens, len(tokens), self.rule, self.n_batch)
        self.online.end()
        self.selection = Selection()
        self._report(0, plan.n_tokens)
        if self._can_select(plan):
            self._read_selecting(tokens, plan)
        else:
            backend.set_full_from(self.ctx, plan.full_from)
            self._read(tokens, plan, self.rule, plan.full_from, Outputs.LAST)

    def _read(
        self,
        tokens: Sequence[int],
        plan: PrefillPlan,
        rule: RowRule,
        full_from: int,
        last: Outputs,
    ) -> None:
        with self.interrupt.watching(self.ctx):
            for start, end in plan.chunks:
                # llama_cpp asks for the logits of each batch's last token, which makes it full.
                outputs = last if end == plan.n_tokens else Outputs.NONE
                self._decode(tokens[start:end], outputs, rule, full_from)
                self.interrupt.check()
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
        question = min(tail, max(n_past, end - N_QUESTION))
        backend.set_full_from(self.ctx, NOWHERE)
        backend.set_sink(self.ctx, 0)
        backend.set_question(self.ctx, question)
        try:
            self._read(tokens, plan, NO_ENDS, NOWHERE, Outputs.NONE)
            chosen = self._select(question, tail, end)
        finally:
            backend.set_question(self.ctx, -1)
            backend.set_sink(self.ctx, self.rule.sink_tokens)
        sink = np.flatnonzero(~self.rows.is_full[: min(self.rule.sink_tokens, tail)])
        deep = [*sink.tolist(), *chosen, *range(tail, end)]
        self.deep.run(deep, logits=True)
        self.selection = Selection(len(chosen), sum(row >= n_past for row in deep))
        self._requires_eval = False

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
        code = self._batch_rows.decode(self.ctx, tokens, start, outputs)
        if code != 0:
            self.interrupt.check()
            raise PopError(logs.first_error() or f"llama.cpp could not decode (code {code})")
        self.input_ids[start:end] = tokens
        if self.pop_mode is Mode.CONTEXT and not self.exact:
            full = full_rows(start, end, rule, full_from, outputs)
        else:
            full = np.full(len(tokens), self.pop_mode is not Mode.ALWAYS)
        self.rows.read(start, full, keeps_states=self.keeps_states)
        if self._logits_all and end <= len(self.scores):
            logits = api.llama_get_logits(self.ctx)
            self.scores[start:end] = np.ctypeslib.as_array(logits, (len(tokens), self._n_vocab))
        self.n_tokens = end
        self._requires_eval = outputs is Outputs.NONE

    def _make_room(self, n_tokens: int) -> None:
        total = self.n_tokens + n_tokens
        if total > self._n_ctx:
            larger = total + 256
            raise PopError(
                f"{total} tokens do not fit the context of {self._n_ctx}",
                f"open the model with a larger one: n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        logs.forget_errors()
        self._forget_from(self.n_tokens)

    # Generation

    def generate(
        self, tokens: Sequence[int], *args: Any, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Sample as llama_cpp does; K/V of the prompt's beginning are reused, its tail is full."""
        self.epoch += 1
        self.selection = Selection()
        tokens = list(tokens)
        usable = self._n_usable(tokens)
        if options.get("reset", True) and usable < self.n_tokens:
            self.n_tokens = usable
            self._requires_eval = True
        try:
            yield from super().generate(tokens, *args, **options)
        finally:
            self.online.end()

    def _n_usable(self, tokens: Sequence[int]) -> int:
        """How many cached rows a prompt may reuse.

        A reading that was stopped before its selection left the sink pruned. Where that cannot be
        made up for, none.
        """
        usable = n_usable(tokens, self._input_ids, self.rows.is_full, self.rule)
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
        """Run this many pruned rows before each token of an answer, 0 for none.

        None: as many as slow decoding by a tenth; `online.n_rows` says how many once it is known.
        """
        self.online.end()
        self.online = OnlineRefill(self.deep, n_rows)

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
        first, total = self.n_exact, self.n_refillable

        def advance() -> None:
            if on_progress is not None:
                on_progress(self.n_exact - first, total)

        try:
            if total:
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
