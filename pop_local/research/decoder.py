"""A dense decoder in torch that supports gradients and loads a GGUF file layer by layer.

The decoder computes the same function as llama.cpp (models/llama.cpp, qwen2, qwen3, gemma3). The
default data type is float32. The decoder's predictions differ from llama.cpp's by a KL of about
0.001, because llama.cpp rounds activations and the KV cache.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pop_converter.fit.weights import Floats, Weights
from pop_converter.gguf.source import Source
from pop_local.research.hyper import Hyper, Rope, read_hyper

_FREQS = "rope_freqs.weight"
# Memory of the Python interpreter with torch, in bytes.
BASE_BYTES = 400_000_000


class Decoder:
    """A dense model that keeps its LM head in memory and loads its layers on demand.

    `matrices`: the data type for storing and multiplying matrices (default: the states' type).
    Raises FormatError for an invalid file or UnsupportedArchitectureError for an unknown model.
    """

    def __init__(self, source: Source, matrices: torch.dtype | None = None) -> None:
        self._matrices = matrices
        self.hyper = read_hyper(source)
        self.n_layer = self.hyper.n_layer
        self._weights = Weights(source)
        self._output_norm = self._tensor("output_norm.weight")
        tied = "output.weight" not in self._weights
        self._head = self._matrix(self._tensor("token_embd.weight" if tied else "output.weight"))
        self.n_vocab = len(self._head)

    def embed(self, tokens: np.ndarray) -> Tensor:
        """Return the states [n_windows, n_tokens, n_embd] for token IDs [n_windows, n_tokens]."""
        rows = self._weights.rows("token_embd.weight", tokens.reshape(-1))
        states = self._to_tensor(rows).reshape(*tokens.shape, -1)
        return states * self.hyper.embedding_scale

    def layer(self, index: int) -> "DecoderLayer":
        """Read and dequantize the weights of one layer."""
        prefix = f"blk.{index}."
        names = self._weights.names(prefix)
        tensors = {name: self._matrix(self._tensor(prefix + name)) for name in names}
        factors = self._tensor(_FREQS) if _FREQS in self._weights else None
        hyper = self.hyper
        return DecoderLayer(tensors, hyper, hyper.ropes[index], hyper.windows[index], factors)

    def logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return the logits [..., n_vocab] for the last layer's output [..., n_embd].

        `tokens` [n]: the tokens whose logits [..., n] are returned (None: all tokens).
        """
        normed = _rms_norm(states, self._output_norm, self.hyper.eps)
        head = self._head if tokens is None else self._head[tokens].to(normed.dtype)
        return functional.linear(normed.to(head.dtype), head).to(normed.dtype)

    def _tensor(self, name: str) -> Tensor:
        return self._to_tensor(self._weights[name])

    def _matrix(self, values: Tensor) -> Tensor:
        return values if self._matrices is None or values.dim() < 2 else values.to(self._matrices)

    def _to_tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))


@dataclass(frozen=True)
class StoredKv:
    """Cached K and V for the rows at `positions` [n_rows].

    `k` [n_windows, n_rows, n_k]: K before norm and RoPE. `v` [n_windows, n_rows, n_v]: V.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


@dataclass(frozen=True)
class DecoderLayer:
    """A layer of the decoder. `window`: the number of visible positions (0: all positions)."""

    tensors: dict[str, Tensor]
    hyper: Hyper
    rope: Rope
    window: int
    rope_factors: Tensor | None

    def __call__(
        self, states: Tensor, positions: Tensor | None = None, stored: StoredKv | None = None
    ) -> Tensor:
        """Return the layer's output, with the same shape as `states` [n_windows, n_rows, n_embd].

        `positions` [n_rows]: the rows' positions (default: 0, 1, ...). `stored`: K and V of other
        rows that these rows also attend to.
        """
        attended = self._linear("attn_output", self._attended(states, positions, stored))
        states = states + self._norm("post_attention_norm", attended)
        passed = self._ffn(self._norm("ffn_norm", states))
        return states + self._norm("post_ffw_norm", passed)

    def key_value(self, states: Tensor, positions: Tensor) -> StoredKv:
        """Return the layer's own K and V for states [n_windows, n_rows, n_embd]."""
        x = self._norm("attn_norm", states)
        return StoredKv(self._linear("attn_k", x), self._linear("attn_v", x), positions)

    def _attended(
        self, states: Tensor, positions: Tensor | None, stored: StoredKv | None
    ) -> Tensor:
        """Return the attention heads' outputs [n_windows, n_rows, n_head * dim_v]."""
        h = self.hyper
        if positions is None:
            positions = torch.arange(states.shape[1])
        kv = self.key_value(states, positions)
        if stored is not None:
            kv = StoredKv(
                torch.cat([stored.k, kv.k], 1),
                torch.cat([stored.v, kv.v], 1),
                torch.cat([stored.positions, kv.positions]),
            )
        q = _heads(self._linear("attn_q", self._norm("attn_norm", states)), h.dim_k)
        q = self._rotated(self._norm("attn_q_norm", q), positions)
        k = self._rotated(self._norm("attn_k_norm", _heads(kv.k, h.dim_k)), kv.positions)
        distance = positions[:, None] - kv.positions
        hidden = distance < 0
        if self.window:
            hidden |= distance >= self.window
        return self._mixed(q, k, _heads(kv.v, h.dim_v), hidden).transpose(1, 2).flatten(2)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """Return the attention output [n_windows, n_head, n_rows, dim_v].

        `hidden` [n_rows, n_keys] is True for the keys that a row must not attend to.
        """
        # Query heads that share a key head are adjacent.
        n_sharing = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n_sharing, 1), v.repeat_interleave(n_sharing, 1)
        scale = self.hyper.attention_scale
        return functional.scaled_dot_product_attention(q, k, v, ~hidden, scale=scale)

    def _ffn(self, x: Tensor) -> Tensor:
        gate = self._linear("ffn_gate", x)
        gelu = self.hyper.gelu
        gate = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
        return self._linear("ffn_down", gate * self._linear("ffn_up", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        product = functional.linear(x.to(weight.dtype), weight).to(x.dtype)
        return product if bias is None else product + bias

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.tensors.get(f"{name}.weight")
        return x if gain is None else _rms_norm(x, gain, self.hyper.eps)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to the first n_rot elements of the last axis of [..., n_rows, dim]."""
        n = self.hyper.n_rot
        exponents = torch.arange(0, n, 2) / n
        frequencies = self.rope.scale * self.rope.base**-exponents
        if self.rope_factors is not None:
            frequencies = frequencies / self.rope_factors
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.hyper.interleaved:
            a, b = x[..., 0:n:2], x[..., 1:n:2]
            rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        else:
            a, b = x[..., : n // 2], x[..., n // 2 : n]
            rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        return torch.cat((rotated, x[..., n:]), -1)


def _heads(x: Tensor, dim: int) -> Tensor:
    """Reshape [n_windows, n_rows, n_heads * dim] to [n_windows, n_heads, n_rows, dim]."""
    return x.reshape(*x.shape[:2], -1, dim).transpose(1, 2)


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
