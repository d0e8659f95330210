"""Random operations on a cache whose prompts are edited."""

import random
from collections.abc import Callable

import numpy as np

from pop_base.errors import StoppedError
from pop_local.engine.cache.saved_state import SavedState
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.reading import PrefillStoppedError
from pop_local.engine.prompt.prompt import Prompt
from support.calls import NOISE, first_of, kv_bytes, last_logits, prompt, read
from support.edited_prompts import OLD, Tokens


def stop_after(n_calls: int) -> Callable[[], bool]:
    """Return a callback that requests a stop from its N-th call on."""
    left = [False] * n_calls
    return lambda: not left or left.pop()


def stopping(after: int) -> Callable[[int, int], None]:
    def on_prefill(done: int, total: int) -> None:
        if done >= after:
            raise StoppedError

    return on_prefill


def randomly_edited(rng: random.Random, tokens: Tokens) -> Tokens:
    start = rng.randrange(len(tokens))
    end = min(len(tokens), start + rng.randrange(1, 60))
    new = prompt(rng.randrange(0, 60), rng.randrange(1000))
    return (tokens[:start] + new + tokens[end:])[:900] or [5]


def is_subsequence(part: Tokens, tokens: Tokens) -> bool:
    left = iter(tokens)
    return all(token in left for token in part)


class Operations:
    """Random reads, edits, answers, stops, refills, saves and restores on one cache.

    Whenever all rows are exact, the state must equal that of a fresh full reading. An answer's rows
    are decoded one at a time, which rounds otherwise: then the next logits are compared.
    """

    def __init__(self, model: PopModel, full: PopModel, seed: int) -> None:
        self._model, self._full = model, full
        self._rng = random.Random(seed)
        self._saved: list[SavedState] = []
        self._has_answers = False
        self.n_edited = self.n_checked = self.n_equal = self.n_stopped = 0

    def run(self, n_steps: int) -> None:
        read(self._model, OLD)
        steps = [self._edit, self._answer, self._refill, self._save, self._restore, self._replace]
        for _ in range(n_steps):
            [step] = self._rng.choices(steps, [8, 2, 6, 1, 1, 1])
            step()
            cache = first_of(self._model).cache
            assert cache.slot.end_position == cache.n_tokens
            assert cache.n_exact <= cache.first_stale
            if 0 < cache.n_exact == cache.n_tokens:
                self._check(cache.tokens.tolist())

    def _edit(self) -> None:
        tokens = randomly_edited(self._rng, first_of(self._model).cache.tokens.tolist() or OLD)
        if len(tokens) < 300:
            tokens += prompt(500, self._rng.randrange(1000))
        sequence = self._model.engine.sequences[0]
        try:
            after = self._rng.choice([0, 1, 40, 10**6, 10**6, 10**6])
            read_result = sequence.read(Prompt(tokens), stopping(after))
        except PrefillStoppedError as error:
            assert error.read.n_prompt == len(tokens)
            assert is_subsequence(sequence.cache.tokens.tolist(), tokens)
            self.n_stopped += 1
            return
        assert sequence.cache.tokens.tolist() == tokens
        assert np.isfinite(last_logits(self._model)).all()
        self.n_edited += read_result.n_stale > 0

    def _replace(self) -> None:
        self._saved.clear()
        self._has_answers = False
        first_of(self._model).cache.clear()
        read(self._model, prompt(self._rng.randrange(1, 800), self._rng.randrange(1000)))

    def _answer(self) -> None:
        self._has_answers = True
        for _ in range(self._rng.randrange(1, 20)):
            self._model.engine.sequences[0].step([self._rng.randrange(3, 300)])

    def _refill(self) -> None:
        first_of(self._model).refiller.refill(stop_after(self._rng.choice([1, 30, 300, 10**6])))

    def _save(self) -> None:
        self._saved = [*self._saved[-3:], first_of(self._model).states.save()]

    def _restore(self) -> None:
        if self._saved:
            first_of(self._model).states.restore(self._rng.choice(self._saved))

    def _check(self, tokens: Tokens) -> None:
        first_of(self._full).cache.clear()
        read(self._full, tokens)
        if self._has_answers:
            for model in (self._model, self._full):
                model.engine.sequences[0].step([5])
            result, expected = last_logits(self._model), last_logits(self._full)
            np.testing.assert_allclose(result, expected, rtol=0, atol=NOISE)
        else:
            assert kv_bytes(self._model) == kv_bytes(self._full)
            self.n_equal += 1
        self.n_checked += 1
