"""Importance of a document's tokens by a small model's attention, as SpecPrefill computes it.

SpecPrefill (arXiv 2502.02789): the small model reads the prompt and generates some look-ahead
tokens. Attention to the document is smoothed, its maximum over layers and heads is averaged over
the asking tokens, and the best chunks are kept. Supports Qwen2 models.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import read_source
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import taps
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.taps import Tapped, TapRequest
from pop_local.engine.model import PopModel

Floats = NDArray[np.float32]
N_PIECE = 512
# As in SpecPrefill.
N_LOOK_AHEAD, N_SMOOTH, N_CHUNK = 8, 13, 32


class AttentionScorer:
    """A small model that scores the tokens of another model with the same vocabulary."""

    def __init__(self, path: Path) -> None:
        source = read_source(path)
        self._weights = Weights(source)

        def number(key: str) -> float:
            value = source.first.of_arch(key)
            assert isinstance(value, int | float), key
            return value

        self._eps = number("attention.layer_norm_rms_epsilon")
        self._base = number("rope.freq_base")
        self._n_heads = int(number("attention.head_count"))
        self._n_kv_heads = int(number("attention.head_count_kv"))
        self._layers = tuple(range(1, int(number("block_count"))))  # layer 0 has no taps
        options = EngineOptions.of(path, n_threads=1, n_ctx=8192, n_batch=N_PIECE)
        self.model = PopModel(options)
        self._keys: list[Tapped] = []

    def read(self, document: Sequence[int]) -> float:
        """Read a document, and return the seconds that this takes without taps."""
        cache = self.model.engine.cache
        cache.clear()
        start = time.perf_counter()
        self._append(document, None)
        seconds = time.perf_counter() - start
        cache.clear()
        self._keys = self._append(document, TapRequest((), self._layers))
        return seconds

    def score(self, question: Sequence[int]) -> tuple[Floats, float]:
        """Return the scores of the document's tokens [n_document] for a question.

        The question's last token and N_LOOK_AHEAD generated tokens ask. Also returns the seconds
        for reading the question and generating them.
        """
        cache = self.model.engine.cache
        n_document = cache.n_tokens
        start = time.perf_counter()
        self._append(question, None)
        ahead: list[int] = []
        while len(ahead) < N_LOOK_AHEAD:
            ahead.append(int(cache.slot.logits.argmax()))
            self._append(ahead[-1:], None)
        seconds = time.perf_counter() - start
        # Single tokens have no taps.
        cache.truncate(n_document)
        asking = self._append([*question, *ahead], TapRequest(self._layers, self._layers))
        cache.truncate(n_document)
        n_asking = 1 + N_LOOK_AHEAD
        best = np.zeros((n_asking, n_document), np.float32)
        for layer in self._layers:
            state = np.concatenate([each.states[layer] for each in asking])[-n_asking:]
            key = np.concatenate([each.k[layer] for each in (*self._keys, *asking)])
            for head in self._attention(layer, state, key)[:, :, :n_document]:
                np.maximum(best, [_smoothed(row) for row in head], out=best)
        return np.asarray(best.mean(0), np.float32), seconds

    def _append(self, tokens: Sequence[int], wanted: TapRequest | None) -> list[Tapped]:
        context, cache = self.model.engine.context, self.model.engine.cache
        found: list[Tapped] = []
        taps.set_taps(context.ctx, wanted)
        for first in range(0, len(tokens), N_PIECE):
            piece = tokens[first : first + N_PIECE]
            cache.append(piece, Outputs.LAST, np.ones(len(piece), bool))
            if wanted is not None:
                tapped = taps.take(context.ctx)
                assert tapped is not None and tapped.n_rows == len(piece)
                found.append(tapped)
        taps.set_taps(context.ctx, None)
        return found

    def _attention(self, layer: int, state: Floats, key: Floats) -> Floats:
        """Return each head's attention [n_heads, n_asking, n_tokens]."""
        name = f"blk.{layer}."
        norm = np.sqrt((state**2).mean(1, keepdims=True) + self._eps)
        query = (state / norm * self._weights[f"{name}attn_norm.weight"]) @ self._weights[
            f"{name}attn_q.weight"
        ].T + self._weights[f"{name}attn_q.bias"]
        n_asking, n_tokens = len(query), len(key)
        positions = np.arange(n_tokens)
        of_heads: Floats = query.reshape(n_asking, self._n_heads, -1).astype(np.float32)
        heads = self._turned(of_heads, positions[-n_asking:])
        keys = self._turned(key.reshape(n_tokens, self._n_kv_heads, -1), positions)
        keys = keys.repeat(self._n_heads // self._n_kv_heads, axis=1)
        found = np.einsum("qhd,khd->hqk", heads, keys) / np.sqrt(heads.shape[2])
        found[:, positions[-n_asking:, None] < positions[None]] = -np.inf
        found = np.exp(found - found.max(2, keepdims=True))
        return np.asarray(found / found.sum(2, keepdims=True), np.float32)

    def _turned(self, rows: Floats, positions: NDArray[np.int_]) -> Floats:
        """Apply RoPE to rows [n, n_heads, n_dims], whose halves are pairs."""
        half = rows.shape[2] // 2
        angles = positions[:, None] * self._base ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = rows[..., :half], rows[..., half:]
        turned = [first * cos - second * sin, first * sin + second * cos]
        return np.asarray(np.concatenate(turned, 2), np.float32)


def _smoothed(row: Floats) -> Floats:
    return np.convolve(row, np.full(N_SMOOTH, 1 / N_SMOOTH, np.float32), "same")


def kept_tokens(scores: Floats, n_kept: int, always: NDArray[np.bool_]) -> NDArray[np.int_]:
    """Return the ascending positions of about `n_kept` tokens: `always`, and the best chunks."""
    kept = always.copy()
    chunks = [slice(first, first + N_CHUNK) for first in range(0, len(scores), N_CHUNK)]
    for chunk in sorted(chunks, key=lambda chunk: -float(scores[chunk].mean())):
        if kept.sum() >= n_kept:
            break
        kept[chunk] = True
    return np.flatnonzero(kept)
