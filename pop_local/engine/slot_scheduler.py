"""Which of a model's sequences a prompt is read in, and what it takes from the others."""

from pop_local.engine.answer import Parts
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.open_model import OpenModel
from pop_local.engine.prompt.prompt import Prompt


class SlotScheduler:
    """The sequences of an open model, given out to one answer each.

    Not for several threads at once: the caller lets one after the other in.
    """

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        # Those that were used least recently come first.
        self._free = list(range(len(model.sequences)))

    def take(self, prompt: Prompt) -> int:
        """Return the free sequence that has the most of a prompt, else one that nobody misses."""
        best = max(self._free, key=lambda index: self._score(index, prompt))
        self._free.remove(best)
        return best

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def parts(self, index: int) -> Parts:
        cache, refiller = self._model.sequences[index]
        return Parts(cache, refiller, self._model.rule)

    def cache(self, index: int) -> KvCache:
        return self._model.sequences[index][0]

    def share(self, index: int, prompt: Prompt) -> None:
        """Have a sequence begin with what another one has of a prompt, busy ones among them."""
        caches = [cache for cache, _ in self._model.sequences]
        if len(caches) > 1:
            best = max(caches, key=lambda cache: cache.n_same(prompt))
            if best is not caches[index]:
                caches[index].share(best, prompt)

    def refillable(self) -> int | None:
        """Return a free sequence whose rows can be refilled, the one used last before others."""
        found = (i for i in reversed(self._free) if self._model.sequences[i][1].n_refillable)
        return next(found, None) if self._model.refills else None

    def n_refillable(self) -> int:
        """How many cached rows are still to run the skipped layers."""
        if not self._model.refills:
            return 0
        return sum(refiller.n_refillable for _, refiller in self._model.sequences)

    def refilled(self, index: int) -> None:
        """Rows of a sequence were redone: others may share them."""
        cache = self.cache(index)
        for other, _ in self._model.sequences:
            if other is not cache:
                other.follow(cache)

    def _score(self, index: int, prompt: Prompt) -> tuple[int, int]:
        """Rows in common count where they are half of what is there, as in KvCache.stash."""
        cache = self.cache(index)
        n_same = cache.n_same(prompt)
        return (n_same if 2 * n_same >= cache.n_tokens else 0), -cache.n_tokens
