"""Teacher forcing: read a context in one mode, then score the text after it.

A row's logits require all layers, so only the context's last token yields a prediction. Each step
raises PopError unless the backend counted the planned number of pruned rows. In a `stopped_by`
block, a measurement can raise StoppedError.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_local.engine.cache.saved_state import SavedState
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.engine.prefill.plan import plan_prefill
from pop_local.engine.prefill.read import append
from pop_local.engine.prompt.prompt import Prompt

Logits = NDArray[np.float32]
Tokens = Sequence[int]

# Maximum batch size if all rows request logits, since a row's logits take n_vocab * 4 bytes.
_MAX_SCORED_ROWS = 128


@dataclass(frozen=True)
class Pruning:
    """The first layer that context rows skip, and the context's prefill mode."""

    boundary: int
    context: Mode = Mode.CONTEXT


FULL = Pruning(0, Mode.OFF)


@contextmanager
def forced(model: PopModel) -> Iterator["Forced"]:
    """Open a model for teacher forcing.

    Even short contexts are pruned. On exit, restores the mode and boundary and clears the cache.
    """
    with model.engine.sequences[0].preserved():
        yield Forced(model)


class Forced:
    """A model that is prepared for teacher forcing (see `forced`)."""

    def __init__(self, model: PopModel) -> None:
        self.rule = replace(model.engine.sequences[0].rule, min_prompt=0)
        self.model = model
        self._sequence = model.engine.sequences[0]
        self._cache, self._context = model.engine.sequences[0].cache, model.engine.context
        self._next = np.empty((0, model.engine.context.vocabulary.n_tokens), np.float32)
        self._state: SavedState | None = None
        self.n_pruned = 0

    def read(self, context: Tokens, pruning: Pruning) -> None:
        """Empty the cache, read a context, and set `n_pruned` to the number of pruned rows."""
        cache = self._cache
        cache.clear()
        if pruning.context is not Mode.OFF:
            self._sequence.set_boundary(pruning.boundary)
            self._sequence.keep_states(False)
        self._sequence.set_mode(pruning.context)
        append(cache, Prompt(context), self.rule)
        self.n_pruned = 0
        if pruning.context is not Mode.OFF:
            deep = find_deep_rows(self._context, np.asarray(context), self.rule.deep_rows)
            plan = plan_prefill(0, len(context), self.rule, len(context), deep=deep)
            self.n_pruned = plan.n_pruned
        self._require("context", len(context), self.n_pruned)
        self._next = self._context.logits().copy()
        self._state = self._sequence.states.save() if self._context.is_recurrent else None

    def predict(self, tokens: Tokens) -> Logits:
        """Return the full model's logits (len(tokens), n_vocab) for text after the context.

        Row i depends on the context and tokens[:i]. On return, the cache holds only the context.
        """
        n_context, n_decoded = self._cache.n_tokens, len(tokens) - 1
        logits = np.empty((len(tokens), self._context.vocabulary.n_tokens), np.float32)
        logits[:1] = self._next
        for start, end in self._append_full(tokens[:n_decoded], Outputs.ALL, _MAX_SCORED_ROWS):
            logits[start + 1 : end + 1] = self._context.logits(end - start)
        self._forget(n_context, self._state)
        return logits

    @property
    def next_token(self) -> int:
        """Return the most likely next token after the context and the tokens added by `extend`."""
        return int(self._next[-1].argmax())

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Context manager that, on exit, removes the tokens that `extend` added to the cache."""
        n_tokens, following, state = self._cache.n_tokens, self._next, self._state
        try:
            yield
        finally:
            self._forget(n_tokens, state)
            self._next, self._state = following, state

    def extend(self, tokens: Tokens) -> None:
        """Append tokens, such as a question or an answer, and run them through all layers."""
        for _ in self._append_full(tokens, Outputs.LAST, self._context.n_batch):
            self._next = self._context.logits().copy()
        self._state = self._sequence.states.save() if self._context.is_recurrent else None

    def _append_full(
        self, tokens: Tokens, outputs: Outputs, n_rows: int
    ) -> Iterator[tuple[int, int]]:
        """Run tokens through all layers in batches of up to `n_rows`. Yield each batch's range."""
        cache, step = self._cache, min(n_rows, self._context.n_batch)
        backend.reset_counters(self._context.ctx)
        cache.slot.set_mode(Mode.OFF)
        cache.slot.begin_decode()
        try:
            for start in range(0, len(tokens), step):
                piece = tokens[start : start + step]
                with cache.slot.interruptible():
                    cache.append(piece, outputs, np.ones(len(piece), bool))
                    cache.slot.raise_if_stopped()
                yield start, start + len(piece)
        finally:
            cache.slot.set_mode(cache.settings.mode)
        self._require("continuation", len(tokens), 0)

    def _forget(self, n_context: int, state: SavedState | None) -> None:
        if state is not None:
            self._cache.load(state)
        elif not self._cache.truncate(n_context):
            raise PopError("this model's KV cache cannot drop its last tokens")

    def _require(self, what: str, n_tokens: int, expected: int) -> None:
        counters = self._cache.slot.counters
        if (counters.n_context, counters.n_rows) != (expected, n_tokens):
            raise PopError(
                f"the measurement is invalid: the backend should have pruned {expected} of"
                f" {n_tokens} {what} tokens, but it pruned {counters.n_context} and"
                f" processed {counters.n_full} in full"
            )
