"""Choice of the sequence for a prompt, and sharing of rows among sequences."""

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.engine import EngineOwner
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import CachedSequence


class SlotScheduler:
    """Assigns each sequence of an engine to one answer at a time.

    The class is not thread-safe.
    """

    def __init__(self, model: EngineOwner) -> None:
        self._model = model
        # Least recently used first.
        self._free = list(range(len(model.engine.sequences)))

    def take(self, prompt: Prompt) -> int:
        """Return the free sequence with the most rows in common, else the least useful one."""
        best = max(self._free, key=lambda index: self._score(index, prompt))
        self._free.remove(best)
        return best

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def sequence(self, index: int) -> CachedSequence:
        return self._model.engine.sequences[index]

    def cache(self, index: int) -> KvCache:
        return self.sequence(index).cache

    def share(self, index: int, prompt: Prompt) -> None:
        """Copy the longest common prefix from any sequence, even a busy one."""
        caches = [sequence.cache for sequence in self._model.engine.sequences]
        if len(caches) > 1:
            best = max(caches, key=lambda cache: cache.n_same(prompt))
            if best is not caches[index]:
                caches[index].share(best, prompt)

    def refillable(self) -> int | None:
        """Return the most recently used free sequence whose rows can be refilled."""
        found = (index for index in reversed(self._free) if self._n_refillable(index))
        return next(found, None)

    def n_refillable(self) -> int:
        """Count the cached rows that must still run the skipped layers."""
        return sum(map(self._n_refillable, range(len(self._model.engine.sequences))))

    def refilled(self, index: int) -> None:
        """Let the other sequences adopt the refilled rows that they share."""
        cache = self.cache(index)
        for other in self._model.engine.sequences:
            if other.cache is not cache:
                other.cache.follow(cache)

    def _n_refillable(self, index: int) -> int:
        refiller = self.sequence(index).refiller
        return refiller.n_refillable if refiller.is_on else 0

    def _score(self, index: int, prompt: Prompt) -> tuple[int, int]:
        """Score common rows only if they are half of the cached rows, as in KvCache.stash."""
        cache = self.cache(index)
        n_same = cache.n_same(prompt)
        return (n_same if 2 * n_same >= cache.n_tokens else 0), -cache.n_tokens
