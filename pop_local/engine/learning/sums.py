"""Sums for fitting projections at some boundaries: choose inputs, add rows, and solve the fits.

`convert` adds rows of text windows, and online_calibrator.py adds rows of prompts. Both get the
same sums from the same rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pop_converter.architecture.shape import ModelShape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, FitError, Gram, KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import Neurons, WideInput, decode_input, wide_input
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.projection import Projection
from pop_local.engine.llama.taps import Rows, Tapped, TapRequest

# The attention of this many last layers determines the weights of the rows.
N_WEIGHING = 4


@dataclass
class Sums:
    """Gram sums by boundary. `wides`: the parameters of each boundary's wider input, if any."""

    wides: dict[int, WideInput] = field(default_factory=dict)
    grams: dict[int, Gram] = field(default_factory=dict)

    def has_same_input(self, other: "Sums", boundary: int) -> bool:
        """Return True if both sums were computed over the same inputs."""
        ours, theirs = self.wides.get(boundary), other.wides.get(boundary)
        if ours is None or theirs is None:
            return ours is theirs
        same_width = len(self.grams[boundary].xx) == len(other.grams[boundary].xx)
        return same_width and bool(np.array_equal(ours.previous, theirs.previous))

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a JSON header and the arrays by name; `of` is the inverse function."""
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
        """Return the sums that `arrays` converted."""
        sums = cls(stored_inputs(head, arrays))
        for boundary, layers, n_rows in head["grams"]:
            xy = {layer: arrays[f"xy.{boundary}.{layer}"] for layer in layers}
            sums.grams[boundary] = Gram(arrays[f"xx.{boundary}"], xy, n_rows)
        return sums


def stored_inputs(head: Any, arrays: Any) -> dict[int, WideInput]:
    """Return each boundary's wider input, given the results of `Sums.arrays`."""
    wides = {}
    for boundary, is_gelu in head["wides"]:
        neurons = None
        if is_gelu is not None:
            gain, gate, up = (arrays[f"{part}.{boundary}"] for part in ("gain", "gate", "up"))
            neurons = Neurons(gain, gate, up, is_gelu)
        wides[boundary] = WideInput(arrays[f"previous.{boundary}"], neurons)
    return wides


class Summing:
    """Adds up a model's rows, and solves for its fits."""

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        projections: Mapping[int, Sequence[Projection]],
        start: Mapping[str, NewTensor] | None = None,
    ) -> None:
        """`projections`: the kinds of fit at each boundary, without `Projection.OWN`.

        `start`: tensors of an earlier fit, toward which the ridge pulls (None: the layers' own
        projections).
        """
        self.shape, self.projections = shape, projections
        self._start = start or {}
        self._weights = Weights(source)
        eps = source.first.of_arch("attention.layer_norm_rms_epsilon")
        self._eps = eps if isinstance(eps, float) else 0.0

    def layers(self, boundary: int) -> range:
        return range(boundary + 1, self.shape.n_layer)

    def wanted(self, boundaries: Iterable[int]) -> TapRequest:
        """Return the tensors to tap for the sums of these boundaries."""
        at = tuple(sorted(boundaries))
        layers = tuple(self.layers(at[0]))
        # All boundaries share the same weighting layers, so that a fit does not depend on the other
        # boundaries.
        weighing = range(max(1, self.shape.n_layer - N_WEIGHING), self.shape.n_layer)
        return TapRequest(at, layers, tuple(weighing))

    def is_wide(self, boundary: int) -> bool:
        """Return True if `choose_input` must be called before rows are added."""
        return Projection.WIDE in self.projections[boundary]

    def state(self, boundary: int, tapped: Tapped) -> Rows:
        """Return the normalized state [n_rows, n_embd]. Raises FitError for infinity and NaN."""
        state = tapped.states[boundary]
        if not np.isfinite(state).all():
            raise FitError(
                f"the output of the model's layer {boundary - 1} is not finite",
                DAMAGED_HINT,
                cause="not-finite",
            )
        return fit.normalised(state, self._eps)

    def start_input(self, boundary: int) -> WideInput:
        """Return the earlier fit's wider input."""
        return decode_input(self.shape, self._weights, boundary, self._start)

    def choose_input(self, boundary: int, windows: Sequence[Rows]) -> WideInput:
        """Choose a boundary's wider input from the normalized states of some windows."""
        return wide_input(self.shape, self._weights, boundary, windows)

    def empty(self, boundary: int, layers: Iterable[int]) -> Gram:
        """Return empty sums for `layers`, which are fitted at a boundary."""
        widths = {layer: self.shape.n_kv(layer) for layer in layers}
        kinds = self.projections[boundary]
        return Gram.empty(max(self._n_inputs(boundary, kind) for kind in kinds), widths)

    def add(self, sums: Sums, tapped: Tapped) -> None:
        """Add all rows except the first row, which has no predecessor or always runs in full.

        All layers share the same row weights, which are the mean over the last N_WEIGHING layers. A
        deep pass computes no state at shallower layers, so it adds nothing to the sums of
        shallower boundaries.
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
        """Solve a layer's fit from the sums at a boundary. Raises FitError."""
        own = self._weights.own_projection(layer, self.shape.n_k[layer], self.shape.n_v[layer])
        if self._start:
            own = fit.decode(layer, self._start, own)
        fitted = fit.fit_layer(layer, gram.of_first(self._n_inputs(boundary, kind)), own, ridge)
        return fit.encode(layer, fitted, stored)

    def _n_inputs(self, boundary: int, kind: Projection) -> int:
        return self.shape.n_embd + self.shape.n_wide(boundary, kind)
