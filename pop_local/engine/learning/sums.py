"""The sums of the fits at some boundaries: how rows become inputs, what is added, what is solved.

`convert` adds windows of a text, learning adds what is read anyway (learner.py). Sums of the same
rows are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pop_converter.architecture.shape import ModelShape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, FitError, Gram, KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import (
    Neurons,
    WideInput,
    decode_input,
    encode_input,
    wide_input,
)
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.projection import Projection
from pop_local.engine.llama.taps import Rows, Tapped, Wanted

# The last layers, whose attention tells how much a row counts.
N_WEIGHING = 4


@dataclass
class Sums:
    """By boundary, `wides`: what makes the wider input where there is one, `grams`: the sums."""

    wides: dict[int, WideInput] = field(default_factory=dict)
    grams: dict[int, Gram] = field(default_factory=dict)

    def has_same_input(self, other: "Sums", boundary: int) -> bool:
        """Whether rows of both are products of the same inputs."""
        ours, theirs = self.wides.get(boundary), other.wides.get(boundary)
        if ours is None or theirs is None:
            return ours is theirs
        same_width = len(self.grams[boundary].xx) == len(other.grams[boundary].xx)
        return same_width and bool(np.array_equal(ours.previous, theirs.previous))

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what JSON can hold of them, and their arrays by name; see `of`."""
        head = {
            "grams": [
                (boundary, list(gram.xy), gram.n_rows) for boundary, gram in self.grams.items()
            ],
            "wides": [
                (boundary, wide.neurons and wide.neurons.is_gelu)
                for boundary, wide in self.wides.items()
            ],
        }
        arrays: dict[str, Any] = {}
        for boundary, gram in self.grams.items():
            arrays[f"xx.{boundary}"] = gram.xx
            arrays |= {f"xy.{boundary}.{layer}": xy for layer, xy in gram.xy.items()}
        for boundary, wide in self.wides.items():
            arrays[f"previous.{boundary}"] = wide.previous
            if (made := wide.neurons) is not None:
                parts = {"gain": made.gain, "gate": made.gate, "up": made.up}
                arrays |= {f"{part}.{boundary}": array for part, array in parts.items()}
        return head, arrays

    @classmethod
    def of(cls, head: Any, arrays: Any) -> "Sums":
        """Return the sums that `arrays` took apart."""
        sums = cls(stored_inputs(head, arrays))
        for boundary, layers, n_rows in head["grams"]:
            xy = {layer: arrays[f"xy.{boundary}.{layer}"] for layer in layers}
            sums.grams[boundary] = Gram(arrays[f"xx.{boundary}"], xy, n_rows)
        return sums


def stored_inputs(head: Any, arrays: Any) -> dict[int, WideInput]:
    """Return the wider inputs that `Sums.arrays` took apart, by boundary."""
    wides = {}
    for boundary, is_gelu in head["wides"]:
        neurons = None
        if is_gelu is not None:
            gain, gate, up = (arrays[f"{part}.{boundary}"] for part in ("gain", "gate", "up"))
            neurons = Neurons(gain, gate, up, is_gelu)
        wides[boundary] = WideInput(arrays[f"previous.{boundary}"], neurons)
    return wides


class Summing:
    """Adds the rows of a model to sums, and solves these."""

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        projections: Mapping[int, Sequence[Projection]],
        start: Mapping[str, NewTensor] | None = None,
    ) -> None:
        """`projections`: the kinds of fit at each boundary, own ones not among them.

        `start`: the tensors of an earlier fit, toward which the ridge pulls in the place of the
        layers' own projections.
        """
        self.shape, self.projections = shape, projections
        self._start = start or {}
        self._weights = Weights(source)
        eps = source.first.of_arch("attention.layer_norm_rms_epsilon")
        self._eps = eps if isinstance(eps, float) else 0.0

    def layers(self, boundary: int) -> range:
        """The layers that are fitted at a boundary."""
        return range(boundary + 1, self.shape.n_layer)

    def wanted(self, boundaries: Iterable[int]) -> Wanted:
        """Return what rows must show to be added to the sums of these boundaries."""
        at = tuple(sorted(boundaries))
        layers = tuple(self.layers(at[0]))
        # The same for all, so that no fit depends on those that are made beside it.
        weighing = range(max(1, self.shape.n_layer - N_WEIGHING), self.shape.n_layer)
        return Wanted(at, layers, tuple(weighing))

    def is_wide(self, boundary: int) -> bool:
        """Whether an input must be chosen (`choose_input`) before rows can be added."""
        return Projection.WIDE in self.projections[boundary]

    def state(self, boundary: int, tapped: Tapped) -> Rows:
        """Return the normalised state [n_rows, n_embd]. Raises FitError if not finite."""
        state = tapped.states[boundary]
        if not np.isfinite(state).all():
            raise FitError(
                f"what layer {boundary - 1} of the model computes is not finite",
                DAMAGED_HINT,
                cause="not-finite",
            )
        return fit.normalised(state, self._eps)

    def start_input(self, boundary: int) -> WideInput:
        """Return the wider input of the earlier fit."""
        return decode_input(self.shape, self._weights, boundary, self._start)

    def choose_input(self, boundary: int, windows: Sequence[Rows]) -> WideInput:
        """Choose what the wider input is made of, by the normalised states of some windows."""
        return wide_input(self.shape, self._weights, boundary, windows)

    def empty(self, boundary: int, layers: Iterable[int]) -> Gram:
        """Return the sums of no row, of some of the layers that are fitted at a boundary."""
        widths = {layer: self.shape.n_kv(layer) for layer in layers}
        kinds = self.projections[boundary]
        return Gram.empty(max(self._n_inputs(boundary, kind) for kind in kinds), widths)

    def add(self, sums: Sums, tapped: Tapped) -> None:
        """Add all rows but the first, which has no predecessor, or runs in full always.

        All layers share one weighting, the mean of the last few. A deep pass shows no boundary
        below its own: nothing is added there.
        """
        y = {layer: np.hstack([k, tapped.v[layer]])[1:] for layer, k in tapped.k.items()}
        weights = [fit.token_weights(mass[1:]) for mass in tapped.mass.values()]
        mean = np.mean(weights, axis=0) if weights else np.ones(tapped.n_rows - 1, np.float32)
        for boundary, gram in sums.grams.items():
            if boundary not in tapped.states:
                continue
            x = self.state(boundary, tapped)
            parts = [x]
            if boundary in sums.wides:
                parts.append(sums.wides[boundary](x))
            gram.add(fit.with_bias(*parts)[1:], y, mean)

    def solve(
        self, gram: Gram, boundary: int, layer: int, kind: Projection, ridge: float, stored: KvType
    ) -> tuple[NewTensor, ...]:
        """Solve for the fit of a layer by the sums at a boundary. Raises FitError."""
        own = self._weights.own_projection(layer, self.shape.n_k[layer], self.shape.n_v[layer])
        if self._start:
            own = fit.decode(layer, self._start, own)
        fitted = fit.fit_layer(layer, gram.of_first(self._n_inputs(boundary, kind)), own, ridge)
        return fit.encode(layer, fitted, stored)

    def encode_input(self, sums: Sums, boundary: int, stored: KvType) -> tuple[NewTensor, ...]:
        """Return the tensors of the wider input at a boundary."""
        return encode_input(boundary, sums.wides[boundary], stored)

    def _n_inputs(self, boundary: int, kind: Projection) -> int:
        return self.shape.n_embd + self.shape.n_wide(boundary, kind)
