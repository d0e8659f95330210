"""Saved states of KV caches, and the cache of earlier prompts' states."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.prompt.prompt import Prompt


@dataclass(frozen=True)
class SavedState:
    """The used cells of a sequence, with each row's token, position and depth.

    `tokens`: int32 [n]. `is_full`: bool [n]. `positions`: int32 [n + 1], see CachedRows. `images`:
    see Prompt.n_equal. `key`: CacheStates.key. `model`: CacheKeys.model.
    """

    key: str
    model: str
    tokens: np.ndarray
    is_full: np.ndarray
    positions: np.ndarray
    cells: bytes
    images: Mapping[int, str] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


_Name = tuple[str, bytes, frozenset[tuple[int, str]]]


class PromptCache:
    """LRU cache of saved states by key and tokens, up to `capacity_bytes` of cells.

    A prompt's state replaces the states of its prefixes. Models and threads may share a cache.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._states: OrderedDict[_Name, SavedState] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def size_bytes(self) -> int:
        return sum(len(state.cells) for state in self._states.values())

    def add(self, key: str, state: SavedState) -> None:
        """Store a state under `key`, and evict the least recently used states if needed.

        A state above the capacity is ignored.
        """
        if len(state.cells) > self.capacity_bytes:
            return
        name = (key, state.tokens.tobytes(), frozenset(state.images.items()))
        with self._lock:
            for other in list(self._states):
                if other[0] == key and name[1].startswith(other[1]) and other[2] <= name[2]:
                    del self._states[other]
            self._states[name] = state
            while self.size_bytes > self.capacity_bytes:
                self._states.popitem(last=False)

    def longest(self, key: str, prompt: Prompt) -> tuple[SavedState | None, int]:
        """Return the state with a prompt's longest prefix, and the prefix length in rows."""
        best, n_best = None, 0
        with self._lock:
            for name, state in self._states.items():
                if name[0] == key and (n := prompt.n_equal(state.tokens, state.images)) > n_best:
                    best, n_best = name, n
            if best is None:
                return None, 0
            self._states.move_to_end(best)
            return self._states[best], n_best
