"""Full rows equal the full model's after random operations on several sequences."""

import random
from dataclasses import replace

import numpy as np
import pytest

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import Reuse
from pop_local.engine.prefill.read import read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.slot_scheduler import SlotScheduler
from support.calls import first_of, opened, prompt
from support.converted import tiny

N_STEPS = 300
# Cells and batches change logits by up to 0.003, another prompt's rows by 0.07 or more.
NOISE = 0.03
STEMS = [prompt(120, seed) for seed in range(3)]


class Work:
    """Random reads, shares, steps, refills and stops on a model with three sequences."""

    def __init__(self, model: PopModel, full: PopModel, seed: int) -> None:
        self._model, self._full = model, full
        self._rng = random.Random(seed)
        self._seats = SlotScheduler(model.engine)
        self._busy: list[int] = []
        self.n_checked = 0

    def run(self) -> None:
        for _ in range(N_STEPS):
            [step] = self._rng.choices(
                [self._read, self._step, self._end, self._refill], [5, 3, 1, 1]
            )
            step()

    def _read(self) -> None:
        if len(self._busy) == 3:
            return
        stem = self._rng.choice(STEMS)[: self._rng.randrange(20, 120)]
        asked = Prompt(stem + prompt(self._rng.randrange(1, 90), self._rng.randrange(6)))
        index = self._seats.take(asked)
        self._busy.append(index)
        sequence = self._seats.sequence(index)
        cache = sequence.cache
        sequence.set_mode(self._rng.choice([Mode.OFF, Mode.CONTEXT, Mode.CONTEXT]))
        if self._rng.random() < 0.8:
            self._seats.share(index, asked)
        rule = replace(first_of(self._model).rule, reuse=self._rng.choice(list(Reuse)))
        read(sequence.states, asked, rule)
        assert cache.tokens.tolist() == asked.tokens
        assert cache.slot.end_position == len(asked)
        if cache.settings.mode is Mode.OFF:
            self._check(cache)

    def _step(self) -> None:
        if self._busy:
            sequence = self._seats.sequence(self._rng.choice(self._busy))
            cache = sequence.cache
            was_exact = cache.n_exact == cache.n_tokens
            sequence.step([self._rng.randrange(3, 300)])
            if was_exact:
                self._check(cache)

    def _end(self) -> None:
        if self._busy:
            index = self._rng.choice(self._busy)
            self._busy.remove(index)
            self._seats.give_back(index)

    def _refill(self) -> None:
        while self._busy:
            self._end()
        index = self._seats.refillable()
        if index is None:
            return
        left = [False] * self._rng.choice([1, 20, 400])
        self._model.engine.sequences[index].refiller.refill(lambda: not left or left.pop())
        for sequence in self._model.engine.sequences:
            cache = sequence.cache
            if 0 < cache.n_tokens == cache.n_exact:
                sequence.step([5])
                self._check(cache)

    def _check(self, cache: KvCache) -> None:
        """Compare the logits with the full model's for the same tokens."""
        first_of(self._full).cache.clear()
        self._full.read(Prompt(cache.tokens.tolist()))
        expected = first_of(self._full).cache.slot.logits[-1]
        np.testing.assert_allclose(cache.slot.logits[-1], expected, rtol=0, atol=NOISE)
        self.n_checked += 1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_full_rows_equal_the_full_models_after_random_operations(tmp_path, arch):
    path = tiny(tmp_path, arch)
    with (
        opened(path, n_parallel=3, keep_states=True, prompt_cache=PromptCache(2**22)) as model,
        opened(path) as full,
    ):
        full.engine.set_mode(Mode.OFF)
        work = Work(model, full, seed=1)
        work.run()
        assert work.n_checked > 20
