"""Saved KV caches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.cache.keys import KvKey


@dataclass(frozen=True)
class SavedState:
    """The cells in use of a llama_context, and what is known of each row.

    `tokens`: int32 [n], `is_full`: bool [n], `positions`: int32 [n + 1] as of CachedRows, `images`
    as of Prompt.n_equal. `model`: KvCache.model_key of the model whose it is.
    """

    key: KvKey
    model: str
    tokens: np.ndarray
    is_full: np.ndarray
    positions: np.ndarray
    cells: bytes
    images: Mapping[int, str] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)
