"""A dense decoder in torch, for gradients: weights from the GGUF, one layer in memory at a time.

The computation is llama.cpp's (models/llama.cpp, qwen2, qwen3, gemma2, gemma3) in float32, where
llama.cpp rounds activations and the KV cache: their logits differ by a KL of about 0.001.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from converter.hyper import Hyper, Rope, read_hyper
from converter.source import Source
from converter.weights import Floats, Weights

_FREQS = "rope_freqs.weight"


class Decoder:
    """A dense model; its embeddings and LM head stay in memory, its layers do not.

    Raises UnsupportedArchitectureError for what it does not compute, FormatError for a bad file.
    """

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.hyper = read_hyper(source)
        self.n_layer = self.hyper.n_layer
        self._weights = Weights(source)
        self.device = torch.device(device)
        self._output_norm = self._tensor("output_norm.weight")
        tied = "output.weight" not in self._weights
        self._head = self._tensor("token_embd.weight" if tied else "output.weight")

    def embed(self, tokens: np.ndarray) -> Tensor:
        """Return the states [n_windows, n_tokens, n_embd] of token ids [n_windows, n_tokens]."""
        rows = self._weights.rows("token_embd.weight", tokens.reshape(-1))
        states = self._to_device(rows).reshape(*tokens.shape, -1)
        return states * self.hyper.embedding_scale

    def layer(self, index: int) -> "Layer":
        """Read and dequantise one layer."""
        prefix = f"blk.{index}."
        tensors = {name: self._tensor(prefix + name) for name in self._weights.names(prefix)}
        factors = self._tensor(_FREQS) if _FREQS in self._weights else None
        hyper = self.hyper
        return Layer(tensors, hyper, hyper.ropes[index], hyper.windows[index], factors)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [..., n_vocab] of the last layer's output [..., n_embd]."""
        normed = _rms_norm(states, self._output_norm, self.hyper.eps)
        return _soft_cap(normed @ self._head.T, self.hyper.final_cap)

    def _tensor(self, name: str) -> Tensor:
        return self._to_device(self._weights[name])

    def _to_device(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)


@dataclass(frozen=True)
class Layer:
    """One layer of the decoder; `window` is the number of visible positions, 0 for all."""

    tensors: dict[str, Tensor]
    hyper: Hyper
    rope: Rope
    window: int
    rope_factors: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """Return the output of the layer for states [n_windows, n_tokens, n_embd], as large."""
        attended = self._attention(self._norm("attn_norm", states))
        states = states + self._norm("post_attention_norm", attended)
        passed = self._ffn(self._norm("ffn_norm", states))
        return states + self._norm("post_ffw_norm", passed)

    def _attention(self, x: Tensor) -> Tensor:
        h = self.hyper
        q = self._turned(self._norm("attn_q_norm", self._heads("attn_q", x, h.dim_k)))
        k = self._turned(self._norm("attn_k_norm", self._heads("attn_k", x, h.dim_k)))
        v = self._heads("attn_v", x, h.dim_v)
        # Query heads that share a key head lie next to each other.
        q = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
        scores = q @ k.unsqueeze(2).transpose(-1, -2)
        capped = _soft_cap(scores * h.attention_scale, h.attention_cap)
        hidden = self._hidden(x.shape[1], x.device)
        mixed = capped.masked_fill(hidden, -torch.inf).softmax(-1) @ v.unsqueeze(2)
        return self._linear("attn_output", mixed.flatten(1, 2).transpose(1, 2).flatten(2))

    def _ffn(self, x: Tensor) -> Tensor:
        gate = self._linear("ffn_gate", x)
        if self.hyper.gelu:
            gate = functional.gelu(gate, approximate="tanh")
        else:
            gate = functional.silu(gate)
        return self._linear("ffn_down", gate * self._linear("ffn_up", x))

    def _heads(self, name: str, x: Tensor, dim: int) -> Tensor:
        """Return [n_windows, n_heads, n_tokens, dim]."""
        return self._linear(name, x).reshape(*x.shape[:2], -1, dim).transpose(1, 2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        )

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """Return `x` as it is where the architecture has no such norm."""
        gain = self.tensors.get(f"{name}.weight")
        return x if gain is None else _rms_norm(x, gain, self.hyper.eps)

    def _turned(self, x: Tensor) -> Tensor:
        """Apply RoPE to the last axis of [..., n_tokens, dim]; what is past n_rot stays."""
        n = self.hyper.n_rot
        angles = self._angles(x)
        cos, sin = angles.cos(), angles.sin()
        if self.hyper.interleaved:
            a, b = x[..., 0:n:2], x[..., 1:n:2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        else:
            a, b = x[..., : n // 2], x[..., n // 2 : n]
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        return torch.cat((turned, x[..., n:]), -1)

    def _angles(self, x: Tensor) -> Tensor:
        n = self.hyper.n_rot
        exponents = torch.arange(0, n, 2, device=x.device) / n
        frequencies = self.rope.scale * self.rope.base**-exponents
        if self.rope_factors is not None:
            frequencies = frequencies / self.rope_factors
        positions = torch.arange(x.shape[-2], device=x.device)
        return positions[:, None] * frequencies

    def _hidden(self, n_tokens: int, device: torch.device) -> Tensor:
        """Return which positions [of a query, of a key] are out of sight."""
        position = torch.arange(n_tokens, device=device)
        distance = position[:, None] - position
        hidden = distance < 0
        return hidden | (distance >= self.window) if self.window else hidden


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x
