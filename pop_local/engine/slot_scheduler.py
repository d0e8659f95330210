"""Choose the sequence for a prompt, and share rows among sequences."""

from pop_local.engine.engine import EngineOwner
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import CachedSequence


class SlotScheduler:
    """Assignment of an engine's sequences to answers, one answer at a time. Not thread-safe."""

    def __init__(self, model: EngineOwner) -> None:
        self._model = model
        # Least recently used first.
        self._free = list(range(len(model.engine.sequences)))

    def take(self, prompt: Prompt) -> int:
        """Return the free sequence with the longest common prefix, or the fewest rows."""
        best = max(self._free, key=lambda index: self._score(index, prompt))
        self._free.remove(best)
        return best

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def sequence(self, index: int) -> CachedSequence:
        return self._model.engine.sequences[index]

    def share(self, index: int, prompt: Prompt) -> None:
        """Share the longest common prefix of all sequences, including busy ones.

        Does nothing if the sequence can reuse more of its rows (see CachedSequence.n_reusable).
        """
        states = [sequence.states for sequence in self._model.engine.sequences]
        if len(states) > 1:
            best = max(states, key=lambda each: each.n_same(prompt))
            n_here = self.sequence(index).n_reusable(prompt)
            if best is not states[index] and best.n_same(prompt) > n_here:
                states[index].share(best, prompt)

    def refillable(self) -> int | None:
        """Return the most recently used free sequence whose rows can be refilled."""
        found = (index for index in reversed(self._free) if self._n_refillable(index))
        return next(found, None)

    def n_refillable(self) -> int:
        """Count the cached rows that must still run the skipped layers."""
        return sum(map(self._n_refillable, range(len(self._model.engine.sequences))))

    def refilled(self, index: int) -> None:
        """Mark the rows that other sequences share with a refilled one as refilled."""
        states = self.sequence(index).states
        for other in self._model.engine.sequences:
            if other.states is not states:
                other.states.follow(states)

    def _n_refillable(self, index: int) -> int:
        refiller = self.sequence(index).refiller
        return refiller.n_refillable if refiller.is_on else 0

    def _score(self, index: int, prompt: Prompt) -> tuple[int, int]:
        """Return the score. Rows count if CacheStates.stash would keep them for the prompt."""
        sequence = self.sequence(index)
        n_reusable, n_tokens = sequence.n_reusable(prompt), sequence.cache.n_tokens
        return (n_reusable if 2 * n_reusable >= n_tokens else 0), -n_tokens
