"""Compute a wide fit's additional inputs z = [p, a] from the normalized boundary state x.

- `p` is the previous token's x, which PCA reduces to a quarter of its size. In the full model,
  attention in the skipped layers copies information from the previous token (induction). A token's
  own boundary state lacks this information.
- `a` is up * act(gate) for the strongest neurons in the boundary layer's FFN, computed from x.
  A neuron's strength is the power that the neuron adds to the layer's output. Outputs are scaled to
  unit variance and clamped, because outliers can ruin a fit. Mixture-of-experts models have no `a`.

The first token in a ubatch has no predecessor, so its own x is used (docs/notebook/wide-fits.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pop_converter.architecture.arch_names import GELU
from pop_converter.architecture.shape import ModelShape
from pop_converter.fit.least_squares import KvType, decode_weight, encode_weight
from pop_converter.fit.weights import Floats, Weights
from pop_converter.gguf.content import NewTensor

_MOST_NEURON = 5.0  # in standard deviations


@dataclass(frozen=True)
class Neurons:
    """FFN neurons with weights `gate` and `up` [n, n_embd], applied to x * `gain` [n_embd]."""

    gain: Floats
    gate: Floats
    up: Floats
    is_gelu: bool

    def __call__(self, x: Floats) -> Floats:
        """Return up * act(gate) [n_rows, n] for normalized states [n_rows, n_embd]."""
        inner = x * self.gain
        gate = inner @ self.gate.T
        if self.is_gelu:
            acted = gate / (1 + np.exp(-2 * 0.7978845608 * (gate + 0.044715 * gate**3)))
        else:
            acted = gate / (1 + np.exp(-gate))
        return np.asarray(acted * (inner @ self.up.T), np.float32)


@dataclass(frozen=True)
class WideInput:
    """A map from x to z, based on scaled neurons and on PCA axes `previous` [n_prev, n_embd]."""

    previous: Floats
    neurons: Neurons | None

    def __call__(self, x: Floats) -> Floats:
        """Return z [n_rows, n_wide] for one ubatch's normalized states [n_rows, n_embd]."""
        before = np.concatenate([x[:1], x[:-1]])
        parts = [before @ self.previous.T]
        if self.neurons is not None:
            parts.append(np.clip(self.neurons(x), -_MOST_NEURON, _MOST_NEURON))
        return np.hstack(parts)


def wide_input(
    shape: ModelShape, weights: Weights, boundary: int, windows: Sequence[Floats]
) -> WideInput:
    """Choose PCA axes and neurons based on sample windows' normalized states [n_rows, n_embd]."""
    n_prev, n_neurons = shape.wide_inputs(boundary)
    rows = np.concatenate(windows).astype(np.float64)
    _, axes = np.linalg.eigh(np.cov(rows.T))
    previous = np.ascontiguousarray(axes[:, ::-1][:, :n_prev].T, np.float32)
    if not n_neurons:
        return WideInput(previous, None)
    name = f"blk.{boundary}.ffn_"
    up = weights[f"{name}up.weight"]
    if f"{name}gate.weight" in weights:
        gate = weights[f"{name}gate.weight"]
    else:
        gate, up = np.split(up, 2)
    every = Neurons(weights[f"{name}norm.weight"], gate, up, shape.arch in GELU)
    strength = np.linalg.norm(weights[f"{name}down.weight"], axis=0)
    spread = _spread(map(every, windows))
    strongest = np.sort(np.argsort(-spread * strength, kind="stable")[:n_neurons])
    scaled = np.asarray(up[strongest] / np.maximum(spread[strongest, None], 1e-6), np.float32)
    return WideInput(previous, replace(every, gate=gate[strongest], up=scaled))


def encode_input(boundary: int, inputs: WideInput, kind: KvType) -> tuple[NewTensor, ...]:
    """Encode a wide input as tensors."""
    parts = {"prev": inputs.previous}
    if inputs.neurons is not None:
        parts |= {"ffn_gate": inputs.neurons.gate, "ffn_up": inputs.neurons.up}
    name = f"blk.{boundary}.pop_"
    return tuple(encode_weight(f"{name}{part}.weight", rows, kind) for part, rows in parts.items())


def decode_input(
    shape: ModelShape, weights: Weights, boundary: int, tensors: Mapping[str, NewTensor]
) -> WideInput:
    """Decode the tensors that `encode_input` returned."""
    name = f"blk.{boundary}.pop_"
    parts = {
        part: decode_weight(tensors[f"{name}{part}.weight"])
        for part in ("prev", "ffn_gate", "ffn_up")
        if f"{name}{part}.weight" in tensors
    }
    neurons = None
    if "ffn_up" in parts:
        gain = weights[f"blk.{boundary}.ffn_norm.weight"]
        neurons = Neurons(gain, parts["ffn_gate"], parts["ffn_up"], shape.arch in GELU)
    return WideInput(parts["prev"], neurons)


def _spread(windows: Iterable[Floats]) -> NDArray[np.float64]:
    """Return the standard deviation [n] over all rows, keeping only one window in memory."""
    n_rows, total, squares = 0, np.zeros(1), np.zeros(1)
    for window in windows:
        n_rows += len(window)
        total = total + window.sum(0, dtype=np.float64)
        squares = squares + np.square(window, dtype=np.float64).sum(0)
    variance = squares / n_rows - np.square(total / n_rows)
    return np.sqrt(np.maximum(np.asarray(variance, np.float64), 0))
