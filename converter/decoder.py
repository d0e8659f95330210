"""A dense decoder in torch, for gradients: weights from the GGUF, one layer in memory at a time.

The computation is llama.cpp's (models/llama.cpp, qwen2, qwen3, gemma2, gemma3) in float32, where
llama.cpp rounds activations and the KV cache: their logits differ by a KL of about 0.001.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .hyper import Hyper, Rope, read_hyper
from .source import Source
from .weights import Floats, Weights

_FREQS = "rope_freqs.weight"


class Decoder:
    """Raises UnsupportedArchitectureError. Embeddings and LM head stay in memory, layers do not."""

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.hyper = read_hyper(source)
        self._weights = Weights(source)
        self._device = torch.device(device)
        self._output_norm = self._tensor("output_norm.weight")
        tied = "output.weight" not in self._weights
        self._head = self._tensor("token_embd.weight" if tied else "output.weight")

    @property
    def n_layer(self) -> int:
        return self.hyper.n_layer

    @property
    def device(self) -> torch.device:
        return self._device

    def embed(self, tokens: np.ndarray) -> Tensor:
        """States [n_windows, n_tokens, n_embd] of int tokens [n_windows, n_tokens]."""
        rows = self._weights.rows("token_embd.weight", tokens.reshape(-1))
        states = self._to_device(rows).reshape(*tokens.shape, -1)
        return states * self.hyper.embedding_scale

    def layer(self, index: int) -> "Layer":
        """Reads and dequantises the layer's weights."""
        prefix = f"blk.{index}."
        tensors = {name: self._tensor(prefix + name) for name in self._weights.names(prefix)}
        factors = self._tensor(_FREQS) if _FREQS in self._weights else None
        hyper = self.hyper
        return Layer(tensors, hyper, hyper.ropes[index], hyper.windows[index], factors)

    def logits(self, states: Tensor) -> Tensor:
        """[..., n_vocab] of the last layer's output [..., n_embd]."""
        normed = _rms_norm(states, self._output_norm, self.hyper.eps)
        return _soft_cap(normed @ self._head.T, self.hyper.final_cap)

    def _tensor(self, name: str) -> Tensor:
        return self._to_device(self._weights[name])

    def _to_device(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self._device)


@dataclass(frozen=True)
class Layer:
    """One layer; `gates` multiply what its two branches add to the residual stream."""

    tensors: dict[str, Tensor]
    hyper: Hyper
    rope: Rope
    window: int
    rope_factors: Tensor | None

    def __call__(self, states: Tensor, gates: Tensor) -> Tensor:
        """[n_windows, n_tokens, n_embd] to the same; `gates` [n_windows, n_tokens, 1]."""
        attended = self._attention(self._norm("attn_norm", states))
        return self._passed(states, gates, attended)

    def apart(self, states: Tensor, gates: Tensor, before: Tensor) -> Tensor:
        """The same for the last rows only, whose gradients do not mix.

        What a row reads of the others is constant here, be they among `states` [n_windows, n_rows,
        n_embd] or `before` them [n_windows, n_before, n_embd]. `gates` [n_windows, n_rows, 1].
        """
        x = self._norm("attn_norm", states)
        with torch.no_grad():
            read = torch.cat((self._norm("attn_norm", before), x), 1)
            keys, values = self._keys(read), self._values(read)
        attended = self._attention_apart(x, keys, values)
        return self._passed(states, gates, attended)

    def _passed(self, states: Tensor, gates: Tensor, attended: Tensor) -> Tensor:
        """What is left of the layer after its attention."""
        states = states + gates * self._norm("post_attention_norm", attended)
        passed = self._ffn(self._norm("ffn_norm", states))
        return states + gates * self._norm("post_ffw_norm", passed)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self._queries(x), self._keys(x), self._values(x)
        return self._output(self._weights(q @ k.transpose(-1, -2)) @ v)

    def _attention_apart(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Of the last rows, `keys` and `values` being those of all."""
        first = keys.shape[-2] - x.shape[1]
        q, k, v = self._queries(x, first), self._keys(x, first), self._values(x)
        # Zeros that carry the gradient of what a row reads of itself.
        own_score = (q.detach() * (k - k.detach())).sum(-1)
        own_value = v - v.detach()
        scores = q @ keys.transpose(-1, -2)
        weights = self._weights(scores + torch.diag_embed(own_score, first)[..., : x.shape[1], :])
        own_weight = weights.diagonal(first, -2, -1).unsqueeze(-1)
        return self._output(weights @ values + own_weight * own_value)

    def _queries(self, x: Tensor, first: int = 0) -> Tensor:
        """[n_windows, n_key_heads, n_group, n_tokens, dim], rows at positions from `first` on."""
        h = self.hyper
        q = self._turned(self._norm("attn_q_norm", self._heads("attn_q", x, h.dim_k)), first)
        # Query heads that share a key head lie next to each other.
        n_key_heads = self.tensors["attn_k.weight"].shape[0] // h.dim_k
        return q.reshape(q.shape[0], n_key_heads, -1, *q.shape[2:])

    def _keys(self, x: Tensor, first: int = 0) -> Tensor:
        """[n_windows, n_key_heads, 1, n_tokens, dim]"""
        k = self._norm("attn_k_norm", self._heads("attn_k", x, self.hyper.dim_k))
        return self._turned(k, first).unsqueeze(2)

    def _values(self, x: Tensor) -> Tensor:
        return self._heads("attn_v", x, self.hyper.dim_v).unsqueeze(2)

    def _weights(self, scores: Tensor) -> Tensor:
        """Of the last rows [..., n_rows, n_tokens] for all."""
        capped = _soft_cap(scores * self.hyper.attention_scale, self.hyper.attention_cap)
        n_rows, n_tokens = scores.shape[-2:]
        return capped.masked_fill(
            self._hidden(n_rows, n_tokens, scores.device), -torch.inf
        ).softmax(-1)

    def _output(self, mixed: Tensor) -> Tensor:
        return self._linear("attn_output", mixed.flatten(1, 2).transpose(1, 2).flatten(2))

    def _ffn(self, x: Tensor) -> Tensor:
        gate = self._linear("ffn_gate", x)
        if self.hyper.gelu:
            gate = functional.gelu(gate, approximate="tanh")
        else:
            gate = functional.silu(gate)
        return self._linear("ffn_down", gate * self._linear("ffn_up", x))

    def _heads(self, name: str, x: Tensor, dim: int) -> Tensor:
        """[n_windows, n_heads, n_tokens, dim]"""
        return self._linear(name, x).reshape(*x.shape[:2], -1, dim).transpose(1, 2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        )

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """As it is where the architecture has no such norm."""
        gain = self.tensors.get(f"{name}.weight")
        return x if gain is None else _rms_norm(x, gain, self.hyper.eps)

    def _turned(self, x: Tensor, first: int) -> Tensor:
        """RoPE over the last axis of [..., n_tokens, dim]; what is past n_rot stays."""
        n = self.hyper.n_rot
        angles = self._angles(x, first)
        cos, sin = angles.cos(), angles.sin()
        if self.hyper.interleaved:
            a, b = x[..., 0:n:2], x[..., 1:n:2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        else:
            a, b = x[..., : n // 2], x[..., n // 2 : n]
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        return torch.cat((turned, x[..., n:]), -1)

    def _angles(self, x: Tensor, first: int) -> Tensor:
        n = self.hyper.n_rot
        exponents = torch.arange(0, n, 2, device=x.device) / n
        frequencies = self.rope.scale * self.rope.base**-exponents
        if self.rope_factors is not None:
            frequencies = frequencies / self.rope_factors
        positions = torch.arange(first, first + x.shape[-2], device=x.device)
        return positions[:, None] * frequencies

    def _hidden(self, n_rows: int, n_tokens: int, device: torch.device) -> Tensor:
        """Which positions [of a query, of a key] are out of sight; the queries are the last."""
        position = torch.arange(n_tokens, device=device)
        distance = position[n_tokens - n_rows :, None] - position
        hidden = distance < 0
        return hidden | (distance >= self.window) if self.window else hidden


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x
