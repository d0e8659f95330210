"""Saved states of KV caches, and the cache of earlier prompts' states."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pop_local.engine.cache.rows import NO_STALE

# Returns the number of rows that a prompt can reuse, given cached tokens and image keys.
CountReusable = Callable[[np.ndarray, Mapping[int, str]], int]


@dataclass(frozen=True)
class SavedState:
    """The used cells of a sequence, with each row's token, position and depth.

    `tokens`: int32 [n]. `is_full`: bool [n]. `positions`: int32 [n + 1], see CachedRows. `images`:
    see Prompt.n_equal. `key`: CacheStates.key. `model`: CacheKeys.model. `first_stale`, `n_exact`:
    see CachedRows.
    """

    key: str
    model: str
    tokens: np.ndarray
    is_full: np.ndarray
    positions: np.ndarray
    cells: bytes
    images: Mapping[int, str] = field(default_factory=dict)
    first_stale: int = NO_STALE
    n_exact: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


class StateStore(Protocol):
    """Storage for states that leave a PromptCache, such as a DiskStore."""

    def add(self, key: str, state: SavedState) -> None:
        """Store a state under `key`."""

    def find(self, key: str, count: CountReusable, n_least: int) -> SavedState | None:
        """Return the state with the most reusable rows, if more than `n_least`."""

    def close(self) -> None:
        """Wait until all states are stored."""


_Name = tuple[str, bytes, frozenset[tuple[int, str]]]


class PromptCache:
    """LRU cache of saved states by key and tokens, up to `capacity_bytes` of cells.

    A prompt's state replaces the states of its prefixes. Models and threads may share a cache.
    States that leave the cache go to `store`.
    """

    def __init__(self, capacity_bytes: int, store: StateStore | None = None) -> None:
        self.capacity_bytes, self.store = capacity_bytes, store
        self._states: OrderedDict[_Name, SavedState] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def size_bytes(self) -> int:
        return sum(len(state.cells) for state in self._states.values())

    def accepts(self, n_bytes: int) -> bool:
        """Return whether `add` stores a state of this size."""
        return n_bytes <= self.capacity_bytes or self.store is not None

    def add(self, key: str, state: SavedState) -> None:
        """Store a state under `key`, and evict the least recently used states if needed.

        A state above the capacity goes to the store at once.
        """
        evicted = [(key, state)]
        if len(state.cells) <= self.capacity_bytes:
            evicted = self._add(key, state)
        if self.store is not None:
            for each in evicted:
                self.store.add(*each)

    def _add(self, key: str, state: SavedState) -> list[tuple[str, SavedState]]:
        """Store a state in memory, and return the evicted ones with their keys."""
        name = (key, state.tokens.tobytes(), frozenset(state.images.items()))
        evicted = []
        with self._lock:
            for other in list(self._states):
                if other[0] == key and name[1].startswith(other[1]) and other[2] <= name[2]:
                    del self._states[other]
            self._states[name] = state
            while self.size_bytes > self.capacity_bytes:
                (other_key, *_), other_state = self._states.popitem(last=False)
                evicted.append((other_key, other_state))
        return evicted

    def best(self, key: str, count: CountReusable, n_least: int = 0) -> SavedState | None:
        """Return the state with the most reusable rows, if more than `n_least`."""
        best, n_best = None, n_least
        with self._lock:
            for name, state in self._states.items():
                if name[0] == key and (n := count(state.tokens, state.images)) > n_best:
                    best, n_best = name, n
            found = None if best is None else self._states[best]
            if best is not None:
                self._states.move_to_end(best)
        stored = None if self.store is None else self.store.find(key, count, n_best)
        return found if stored is None else stored

    def close(self) -> None:
        """Move all states to the store, and wait until they are stored."""
        if self.store is None:
            return
        with self._lock:
            left, self._states = self._states, OrderedDict()
        for (key, *_), state in left.items():
            self.store.add(key, state)
        self.store.close()
