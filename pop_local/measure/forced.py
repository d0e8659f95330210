"""Fitter forcing: a context read in one mode, then texts that follow it, scored.

Logits exist only where they are requested, and rows that request logits are full in every mode but
ALWAYS. So nothing of the context is ever scored but what its last token predicts. The row counters
must show after each context, and after each text, that as many rows were pruned as planned;
otherwise PopError. Whoever watches the work (`stopped_by`) may stop it: StoppedError.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import PopError
from pop_converter.popfile.plan import Plan
from pop_local.engine.cache.prompt_cache import SavedState
from pop_local.engine.depth.online import OnlineRefill
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule, plan_prefill
from pop_local.engine.prefill.read import append
from pop_local.engine.prompt.prompt import Prompt

Logits = NDArray[np.float32]
Tokens = Sequence[int]

# Rows of one batch that all request logits, which is what takes memory (n_vocab * 4 bytes each).
_MAX_SCORED_ROWS = 128


@dataclass(frozen=True)
class Pruning:
    """Where and when layers are skipped: while the context is read, and in what follows it.

    `select`: the share of the context's rows that run all layers because its tail needs them.
    `n_refilled`: rows that are given their depth before each token that follows.
    """

    boundary: int
    context: Mode = Mode.CONTEXT
    continuation: Mode = Mode.OFF
    select: float = 0.0
    n_refilled: int = 0


FULL = Pruning(0, Mode.OFF)


def always_skip(boundary: int) -> Pruning:
    """Return the stage-agnostic baseline, in which every token skips the layers.

    Those that are predicted skip them, too: the model is its first layers and its head, as in
    ShortGPT (Men et al., 2024).
    """
    return Pruning(boundary, Mode.ALWAYS, Mode.ALWAYS)


def n_pruned(rule: RowRule, n_context: int, pruning: Pruning) -> int:
    """Return how many tokens of a context must stop at the boundary."""
    if pruning.context is Mode.CONTEXT:
        n = plan_prefill(0, n_context, rule, n_context).n_pruned
        return n - round(pruning.select * n)
    return n_context if pruning.context is Mode.ALWAYS else 0


def as_planned(model: PopModel, plan: Plan) -> None:
    """Let the model's full tokens be those of the plan; this empties the KV cache."""
    model.rule = replace(model.rule, sink_tokens=plan.sink_tokens, tail_tokens=plan.tail_tokens)
    model.cache.clear()


@contextmanager
def forced(model: PopModel) -> Iterator["Forced"]:
    """Open a model for teacher forcing.

    Contexts of any length are pruned: `min_prompt` is a matter of speed. Afterwards mode and
    boundary are as before, and the KV cache is empty.
    """
    with model.cache.preserved():
        yield Forced(model)


class Forced:
    """A model that is told what to read and what to predict; `forced` makes one."""

    def __init__(self, model: PopModel) -> None:
        self.rule = replace(model.rule, min_prompt=0, select=0.0)
        self.model = model
        self._cache, self._context = model.cache, model.context
        self._next = np.empty((0, model.context.n_vocab), np.float32)
        self._state: SavedState | None = None

    def read(self, context: Tokens, pruning: Pruning) -> None:
        """Read a context into an empty cache. Raises PopError unless it is pruned as planned."""
        cache = self._cache
        cache.clear()
        if pruning.context is not Mode.OFF:
            cache.set_boundary(pruning.boundary)
            needs = pruning.n_refilled > 0 or pruning.select > 0
            if needs and self.model.no_refill:
                raise PopError(
                    f"this model's rows cannot be given their depth later: {self.model.no_refill}",
                    "measure without refilling and without a selection",
                )
            cache.keep_states(needs)
        cache.set_mode(pruning.context)
        append(cache, Prompt(context), replace(self.rule, select=pruning.select))
        self._require("context", len(context), n_pruned(self.rule, len(context), pruning))
        self._next = self._context.logits().copy()
        self._state = cache.save() if self._context.is_recurrent else None

    def predict(self, tokens: Tokens, pruning: Pruning = FULL) -> Logits:
        """Logits (len(tokens), n_vocab) for a text right after the context.

        Row i is what context and tokens[:i] predict. All rows but those of the context are full,
        or none is in mode ALWAYS. The text is forgotten again, so that another may follow the same
        context; rows of the context that were given their depth meanwhile stay deep. Raises
        PopError unless the text is pruned as the mode requires.
        """
        cache, mode = self._cache, pruning.continuation
        n_context, n_decoded = cache.n_tokens, len(tokens) - 1
        backend.reset_counters(self._context.ctx)
        # Attention is counted in mode CONTEXT; the rows are full there, too: they ask for logits.
        cache.slot.set_mode(Mode.CONTEXT if pruning.n_refilled else mode)
        cache.slot.begin_step()
        logits = np.empty((len(tokens), self._context.n_vocab), np.float32)
        logits[:1] = self._next
        step = 1 if pruning.n_refilled else min(_MAX_SCORED_ROWS, self._context.n_batch)
        refilling = OnlineRefill(cache, pruning.n_refilled)
        try:
            for start in range(0, n_decoded, step):
                piece = tokens[start : min(start + step, n_decoded)]
                refilling.before_row(cache.n_tokens)
                with cache.slot.watching():
                    cache.append(piece, Outputs.ALL, np.ones(len(piece), bool))
                    cache.slot.check()
                logits[start + 1 : start + 1 + len(piece)] = self._context.logits(len(piece))
        finally:
            refilling.end()
            cache.slot.set_mode(cache.mode)
        self._require("continuation", n_decoded, n_decoded if mode is Mode.ALWAYS else 0)
        if self._state is not None:
            cache.take_over(self._state)
        elif not cache.truncate(n_context):
            raise PopError("this model's KV cache cannot forget its last tokens")
        return logits

    def _require(self, what: str, n_tokens: int, expected: int) -> None:
        counters = self._cache.slot.counters
        n_deep = counters.n_deep if what == "context" else 0
        if (counters.n_context - n_deep, counters.n_rows) != (expected, n_tokens):
            raise PopError(
                f"the measurement does not hold: of {n_tokens} {what} tokens {expected} should be"
                f" pruned; the backend counted {counters.n_context} pruned, of which"
                f" {counters.n_deep} ran all layers afterwards, {counters.n_full} full"
            )
