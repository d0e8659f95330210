"""Choose a sequence for each prompt and share cached rows among sequences."""

import threading

from pop_local.engine.engine import Engine
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import Sequence


class SlotScheduler:
    """A scheduler that assigns each of an engine's sequences to one answer at a time.

    Only `take`, `give_back`, and `n_cached` are thread-safe.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Least recently used first.
        self._free = list(range(len(engine.sequences)))
        self._lock = threading.Lock()

    def take(self, prompt: Prompt, scope: str = "") -> int:
        """Reserve the free sequence with the most reusable rows (in a tie, the shortest sequence).

        `scope`: the owner of the rows that may be reused. Returns the sequence's index.
        """
        with self._lock:
            best = max(self._free, key=lambda index: self._score(index, prompt, scope))
            self._free.remove(best)
            return best

    def n_cached(self, prompt: Prompt, scope: str) -> int:
        """Return how many rows a prompt may reuse. Busy sequences share only the common prefix."""
        with self._lock:
            counts = [
                sequence.n_reusable(prompt) if i in self._free else sequence.states.n_same(prompt)
                for i, sequence in enumerate(self._engine.sequences)
                if sequence.states.scope == scope
            ]
            return max(counts, default=0)

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def clear(self) -> None:
        """Store all cached rows in the prompt cache and empty all sequences."""
        for sequence in self._engine.sequences:
            sequence.states.store()
            sequence.cache.clear()

    def sequence(self, index: int) -> Sequence:
        return self._engine.sequences[index]

    def share(self, index: int, prompt: Prompt) -> None:
        """Share the longest cached prefix of the prompt with sequence `index`.

        Does nothing if sequence `index` can already reuse the whole prefix.
        """
        scope = self.sequence(index).states.scope
        states = [other.states for other in self._engine.sequences]
        states = [other for other in states if other.scope == scope]
        if len(states) > 1:
            best = max(states, key=lambda other: other.n_same(prompt))
            n_here = self.sequence(index).n_reusable(prompt)
            if best is not self.sequence(index).states and best.n_same(prompt) > n_here:
                self.sequence(index).states.share(best, prompt)

    def refillable(self) -> int | None:
        """Return the most recently used free sequence with rows to refill, or None."""
        for index in reversed(self._free):
            refiller = self.sequence(index).refiller
            if refiller.is_on and refiller.n_refillable:
                return index
        return None

    def _score(self, index: int, prompt: Prompt, scope: str) -> tuple[int, int]:
        """Return a sort key: (number of reusable rows, negated number of cached rows).

        The first number is 0 unless the prompt reuses at least half of the cached rows or is
        entirely cached. A prompt with a short common prefix must not replace a long conversation.
        """
        sequence = self.sequence(index)
        n_tokens = sequence.cache.n_tokens
        if sequence.states.scope != scope:
            return 0, -n_tokens
        n_reusable = sequence.n_reusable(prompt)
        counts = 2 * n_reusable >= n_tokens or sequence.states.n_same(prompt) == len(prompt)
        return (n_reusable if counts else 0), -n_tokens
