"""An LRU cache of earlier prompts' saved states."""

import threading

from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.saved_state import CountReusable, SavedState


class PromptCache:
    """An LRU cache for up to `capacity_bytes` of saved states, indexed by key and tokens.

    A prompt's state replaces the states of its prefixes. Multiple models and threads may share a
    cache. Evicted states are moved to `store`, or dropped if `store` is None.
    """

    def __init__(self, capacity_bytes: int, store: DiskStore | None = None) -> None:
        self.capacity_bytes, self.store = capacity_bytes, store
        # Keys and states, least recently used first.
        self._states: list[tuple[str, SavedState]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def size_bytes(self) -> int:
        return sum(len(state.cells) for _, state in self._states)

    def accepts(self, n_bytes: int) -> bool:
        """Return whether `add` would store a state of the given size."""
        return n_bytes <= self.capacity_bytes or self.store is not None

    def add(self, key: str, state: SavedState) -> None:
        """Store a state under `key` and evict the least recently used states if needed.

        A state larger than the capacity goes straight to the store.
        """
        evicted = []
        if len(state.cells) > self.capacity_bytes:
            evicted = [(key, state)]
        else:
            with self._lock:
                kept = [
                    (other_key, other)
                    for other_key, other in self._states
                    if other_key != key or not state.extends(other.tokens, other.images)
                ]
                self._states = [*kept, (key, state)]
                while self.size_bytes > self.capacity_bytes:
                    evicted.append(self._states.pop(0))
        if self.store is not None:
            for entry in evicted:
                self.store.add(*entry)

    def best(self, key: str, count: CountReusable, n_least: int = 0) -> SavedState | None:
        """Return the state with the most reusable rows if it has more than `n_least` such rows."""
        best, n_best = None, n_least
        with self._lock:
            for index, (other_key, state) in enumerate(self._states):
                if other_key == key and (n := count(state.tokens, state.images)) > n_best:
                    best, n_best = index, n
            best_state = None if best is None else self._states[best][1]
            if best is not None:
                self._states.append(self._states.pop(best))
        stored = None if self.store is None else self.store.find(key, count, n_best)
        return best_state if stored is None else stored

    def close(self) -> None:
        """Move all states to the store and wait until they are written."""
        if self.store is None:
            return
        with self._lock:
            states, self._states = self._states, []
        for entry in states:
            self.store.add(*entry)
        self.store.close()
