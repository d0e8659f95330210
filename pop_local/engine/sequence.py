"""Read prompts into a sequence's KV cache and sample tokens."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.saved_states import SavedStates
from pop_local.engine.cache.sequence_settings import SequenceSettings
from pop_local.engine.decode.sampler import Sampler
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.prefill.edit import ReusableRows
from pop_local.engine.prefill.plan import RowRule
from pop_local.engine.prefill.read import read
from pop_local.engine.prefill.reading import OnPrefill, Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.refill import Refiller


@dataclass(frozen=True)
class Sequence:
    """A KV cache, its saved states, its refiller, and the rule that selects full rows.

    Changing the boundary empties the cache. Changing the mode also empties the cache, unless the
    model skips layers without loss. If all rows are exact, the cache is kept when the mode changes
    to OFF. If `keeps_exact` is True, exact rows are kept after any mode change.
    """

    states: SavedStates
    refiller: Refiller
    rule: RowRule

    @property
    def cache(self) -> KvCache:
        return self.states.cache

    # Settings

    @property
    def settings(self) -> SequenceSettings:
        return self.cache.settings

    def set_mode(self, mode: Mode, *, keeps_exact: bool = False) -> None:
        """Set the mode and, if the cached rows depend on it, empty the cache.

        Raises PopError if the model cannot be pruned and cannot skip layers without loss.
        """
        cache, settings = self.cache, self.cache.settings
        with cache.context.locked():
            cache.slot.require_idle()
            if mode is settings.mode:
                return
            if mode is not Mode.OFF and not settings.can_switch:
                raise PopError(
                    f"{cache.context.files.path} has no pruning keys",
                    "convert it first",
                    cause="not-converted",
                    model=str(cache.context.files.path),
                )
            if not settings.exact:
                self.states.store()
            # By default, full rows are dropped before pruning, so that callers can compare modes.
            is_reusable = (mode is Mode.OFF or keeps_exact) and cache.n_exact == cache.n_tokens
            cache.slot.set_mode(mode)
            cache.settings = replace(settings, mode=cache.slot.mode)
            if not (is_reusable or settings.exact):
                cache.clear()

    def set_boundary(self, layer: int) -> None:
        """Set the boundary layer and empty the cache (see backend.set_boundary)."""
        cache = self.cache
        with cache.context.locked():
            cache.slot.require_idle()
            backend.set_boundary(cache.context.ctx, layer)
            settings = SequenceSettings.of(cache.slot)
            cache.settings = replace(settings, keeps_states=cache.settings.keeps_states)
            cache.clear()

    def keep_states(self, keep: bool) -> None:
        """Start storing new rows' boundary states, or drop all states if `keep` is False."""
        cache = self.cache
        backend.call("llama_pop_set_snapshots", cache.context.ctx, keep)
        cache.settings = replace(cache.settings, keeps_states=keep)
        if not keep:
            cache.has_state[:] = False

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the settings and empty the cache on exit."""
        settings = self.cache.settings
        try:
            yield
        finally:
            self.set_boundary(settings.boundary)
            self.set_mode(settings.mode)
            self.keep_states(settings.keeps_states)
            self.cache.clear()

    # Reading and answering

    def n_reusable(self, prompt: Prompt) -> int:
        """Return the number of cached rows that a prompt may reuse."""
        cache = self.cache
        return ReusableRows(cache, prompt, self.rule).count(cache.tokens, cache.images)

    def read(self, prompt: Prompt, on_prefill: OnPrefill | None = None) -> Read:
        """Read a prompt into the cache (see prefill.read.read)."""
        with self.cache.context.locked():
            return read(self.states, prompt, self.rule, on_prefill)

    def step(self, tokens: list[int]) -> np.ndarray:
        """Append an answer's next tokens and return their logits, float32 [n, n_vocab].

        All layers compute the rows unless the mode is ALWAYS. The logits are valid until the next
        batch.
        """
        self.cache.make_room(len(tokens))
        self.cache.slot.begin_decode()
        self.cache.append(tokens, Outputs.ALL, np.ones(len(tokens), bool))
        return self.cache.slot.logits

    def sampled(self, sampler: Sampler) -> Generator[int]:
        """Sample tokens after the cached prompt and yield them indefinitely.

        Raises DisplacedError if another prompt replaces the cached rows after the first token.
        """
        cache = self.cache
        epoch = cache.epoch
        try:
            logits = cache.slot.logits
            while True:
                token = sampler.sample(logits[-1])
                yield token
                if cache.epoch != epoch:
                    raise DisplacedError
                logits = self.step([token])
                if cache.epoch != epoch:
                    raise DisplacedError
        finally:
            sampler.close()
