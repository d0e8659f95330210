"""Greedy sampling straight from the logits.

llama.cpp's sampler chain first builds a list of {id, logit, p} for the whole vocabulary, for each
token. Taking the largest logit needs none, and picks the same token (the first of the largest).
"""

import ctypes
from typing import Any

import numpy as np

from pop_local.engine.llama.backend import bindings


class GreedySampler:
    """Stands in for llama_cpp's LlamaSampler where nothing but the largest logit is asked for."""

    def __init__(self, n_vocab: int) -> None:
        self._row_type = ctypes.c_float * n_vocab
        self._get_logits = bindings().llama_get_logits_ith

    def sample(self, context: Any, row: int = -1) -> int:
        logits = self._get_logits(context.ctx, row)
        values = self._row_type.from_address(ctypes.addressof(logits.contents))
        return int(np.frombuffer(memoryview(values), dtype=np.float32).argmax())

    def close(self) -> None:
        """Nothing is held."""
