"""Choose the sequence for a prompt, and share rows among sequences."""

from pop_local.engine.engine import EngineOwner
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import CachedSequence


class SlotScheduler:
    """A scheduler that assigns each of an engine's sequences to one answer at a time.

    It is not thread-safe.
    """

    def __init__(self, model: EngineOwner) -> None:
        self._model = model
        # Least recently used first.
        self._free = list(range(len(model.engine.sequences)))

    def take(self, prompt: Prompt) -> int:
        """Reserve the free sequence with the most reusable rows, or else the fewest rows.

        Returns its index.
        """
        best = max(self._free, key=lambda index: self._score(index, prompt))
        self._free.remove(best)
        return best

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def sequence(self, index: int) -> CachedSequence:
        return self._model.engine.sequences[index]

    def share(self, index: int, prompt: Prompt) -> None:
        """Copy the longest prefix of the prompt that another sequence has cached, even a busy one.

        Does nothing if sequence `index` already has as long a prefix.
        """
        states = [sequence.states for sequence in self._model.engine.sequences]
        if len(states) > 1:
            best = max(states, key=lambda each: each.n_same(prompt))
            n_here = self.sequence(index).n_reusable(prompt)
            if best is not states[index] and best.n_same(prompt) > n_here:
                states[index].share(best, prompt)

    def refillable(self) -> int | None:
        """Return the most recently used free sequence with rows to refill, or None."""
        found = (index for index in reversed(self._free) if self._n_refillable(index))
        return next(found, None)

    def n_refillable(self) -> int:
        """Return the number of cached rows that have not run the skipped layers yet."""
        return sum(map(self._n_refillable, range(len(self._model.engine.sequences))))

    def refilled(self, index: int) -> None:
        """Mark the rows that other sequences share with refilled sequence `index` as refilled."""
        states = self.sequence(index).states
        for other in self._model.engine.sequences:
            if other.states is not states:
                other.states.follow(states)

    def _n_refillable(self, index: int) -> int:
        refiller = self.sequence(index).refiller
        return refiller.n_refillable if refiller.is_on else 0

    def _score(self, index: int, prompt: Prompt) -> tuple[int, int]:
        """Return (rows to reuse, minus the cached rows), for comparing sequences.

        Reusable rows count only if CacheStates.stash would not move them to the prompt cache.
        """
        sequence = self.sequence(index)
        n_reusable, n_tokens = sequence.n_reusable(prompt), sequence.cache.n_tokens
        return (n_reusable if 2 * n_reusable >= n_tokens else 0), -n_tokens
