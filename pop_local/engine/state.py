"""Saved KV states that know under which mode and boundary they were computed."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from .backend import Mode, bindings


@dataclass(frozen=True)
class KvKey:
    """What the K/V of a prompt depend on besides its tokens; never to be mixed in one cache."""

    mode: Mode
    boundary: int

    @property
    def as_token(self) -> int:
        """A number that is no token, one for each key."""
        return -1 - (self.boundary * len(Mode) + self.mode)

    def __str__(self) -> str:
        return f"mode {self.mode.name}, boundary {self.boundary}"


FULL = KvKey(Mode.OFF, 0)


class PopState(LlamaState):
    """A LlamaState, and for each of its tokens whether it ran all layers."""

    def __init__(self, *, key: KvKey, is_full: np.ndarray, **fields: Any) -> None:
        super().__init__(**fields)
        self.key = key
        self.is_full = is_full


def context_state(ctx: Any) -> bytes:
    """All that a llama_context holds."""
    api = bindings()
    buffer = np.empty(api.llama_state_get_size(ctx), dtype=np.uint8)
    return buffer[: api.llama_state_get_data(ctx, _bytes_at(buffer), buffer.size)].tobytes()


def restore_context_state(ctx: Any, state: bytes) -> bool:
    """Whether it could be restored; what the context holds is undefined if not."""
    buffer = np.frombuffer(state, dtype=np.uint8).copy()
    return bool(bindings().llama_state_set_data(ctx, _bytes_at(buffer), buffer.size) == buffer.size)


def _bytes_at(buffer: np.ndarray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class KeyedCache(BaseLlamaCache):
    """A prompt cache of llama_cpp in which only states of the model's own key are found."""

    def __init__(self, cache: BaseLlamaCache, key: KvKey) -> None:
        super().__init__(cache.capacity_bytes)
        self.cache = cache
        self.key = key

    @property
    def cache_size(self) -> int:
        return int(self.cache.cache_size)

    def __getitem__(self, tokens: Sequence[int]) -> LlamaState:
        return self.cache[self._keyed(tokens)]

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._keyed(tokens) in self.cache

    def __setitem__(self, tokens: Sequence[int], state: LlamaState) -> None:
        self.cache[self._keyed(tokens)] = state

    def _keyed(self, tokens: Sequence[int]) -> list[int]:
        return [self.key.as_token, *tokens]
