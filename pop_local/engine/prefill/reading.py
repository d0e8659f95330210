"""A prompt that is being read, and the result of reading it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import StoppedError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama.backend import Counters
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.prefill.plan import RowRule

# Called with (done, total) uncached rows at the start and after each batch.
OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True)
class Read:
    """The result of reading a prompt.

    `n_cached`: the number of reused rows, of which `n_stale` are stale. `counters`: row counts.
    `encode_s`: image encoding time in seconds. `n_exact`: the number of leading rows that are exact
    after reading (see KvCache). `is_short`: whether the prompt is too short to prune.
    """

    n_prompt: int
    n_cached: int
    counters: Counters
    encode_s: float = 0.0
    n_exact: int = 0
    n_stale: int = 0
    is_short: bool = False


class PrefillStoppedError(StoppedError):
    """Error raised when reading is stopped. `read`: the result for the rows decoded so far."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read


class PromptReading(ABC):
    """A prompt that is being read. `n_total`: the number of rows to decode."""

    def __init__(
        self, cache: KvCache, rule: RowRule, on_prefill: OnPrefill | None, n_total: int
    ) -> None:
        self._cache, self._rule = cache, rule
        self._on_prefill, self._n_total = on_prefill, n_total
        self._epoch = cache.epoch
        cache.slot.begin_prefill()

    @abstractmethod
    def run(self) -> None:
        """Decode all rows. An early stop raises StoppedError or the signal handler's exception."""

    @abstractmethod
    def result(self) -> Read:
        """Return the result for the rows decoded so far."""

    def complete(self) -> Read:
        """Decode all rows. An early stop raises PrefillStoppedError with the result so far."""
        try:
            self.run()
        except StoppedError as error:
            if self._cache.context.is_closed:
                raise
            raise PrefillStoppedError(self.result()) from error
        return self.result()

    def _report(self, n_done: int) -> None:
        if self._on_prefill is not None:
            self._on_prefill(n_done, self._n_total)
        self._require_undisplaced()

    def _require_undisplaced(self) -> None:
        if self._cache.epoch != self._epoch:
            raise DisplacedError

    def _full_rows(
        self, positions: np.ndarray, deep: NDArray[np.bool_], full_from: int, outputs: Outputs
    ) -> NDArray[np.bool_]:
        """Pass a batch's deep rows to the backend. Return the rows that are full in mode CONTEXT.

        `positions`: int [n]. `deep`: a mask of the deep rows, bool [n]. Returns a mask, bool [n].
        """
        self._cache.slot.set_deep_rows(positions[deep])
        is_sink, is_tail = positions < self._rule.sink_tokens, positions >= full_from
        full: NDArray[np.bool_] = is_sink | is_tail | deep
        full[-1] |= outputs is Outputs.LAST
        return full
