"""Saved KV caches, and those of prompts that another one drove out."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.prompt.prompt import Prompt


@dataclass(frozen=True)
class SavedState:
    """The cells in use of a llama_context, and what is known of each row.

    `tokens`: int32 [n], `is_full`: bool [n], `positions`: int32 [n + 1] as of CachedRows, `images`
    as of Prompt.n_equal. `key`, `model`: KvCache.key and model_key.
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
    """Saved states by key and tokens, up to `capacity_bytes` of cells; the oldest goes first.

    A prompt takes the place of those that it goes on from, and one that is too large drives no
    others out. Several models, and threads, may share one.
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
        """Keep a state under the key of whoever may use it."""
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
        """Find the state of a key that has the most rows in common with a prompt, and how many."""
        best, n_best = None, 0
        with self._lock:
            for name, state in self._states.items():
                if name[0] == key and (n := prompt.n_equal(state.tokens, state.images)) > n_best:
                    best, n_best = name, n
            if best is None:
                return None, 0
            self._states.move_to_end(best)
            return self._states[best], n_best
