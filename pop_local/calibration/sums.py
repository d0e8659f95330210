"""Sums for fitting projections at given boundaries."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pop_converter.architecture.shape import ModelShape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, FitError, Gram, KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import WideInput, wide_input
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source
from pop_converter.projection import Projection
from pop_local.engine.llama.taps import Rows, Tapped, TapRequest

# Number of last layers whose attention determines the row weights.
N_WEIGHING = 4


@dataclass
class Sums:
    """Gram matrices keyed by boundary. `wides`: the additional inputs of the wide fits."""

    wides: dict[int, WideInput] = field(default_factory=dict)
    grams: dict[int, Gram] = field(default_factory=dict)


class Summing:
    """A solver that accumulates sums over a model's rows and computes fits from them."""

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        projections: Mapping[int, Sequence[Projection]],
    ) -> None:
        """`projections`: the kinds of fits at each boundary, excluding `Projection.OWN`."""
        self.shape, self.projections = shape, projections
        self._weights = Weights(source)
        eps = source.first.of_arch("attention.layer_norm_rms_epsilon")
        self._eps = eps if isinstance(eps, float) else 0.0

    def layers(self, boundary: int) -> range:
        return range(boundary + 1, self.shape.n_layer)

    def wanted(self, boundaries: Iterable[int]) -> TapRequest:
        """Return the tensors to tap for the sums at the given boundaries."""
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
        """Return the normalized state [n_rows, n_embd]. Raises FitError for inf or NaN values."""
        state = tapped.states[boundary]
        if not np.isfinite(state).all():
            raise FitError(
                f"the output of layer {boundary - 1} contains NaN or infinity",
                DAMAGED_HINT,
                cause="not-finite",
            )
        return fit.normalised(state, self._eps)

    def choose_input(self, boundary: int, windows: Sequence[Rows]) -> WideInput:
        """Choose a wide fit's additional inputs from the normalized states of the given windows."""
        return wide_input(self.shape, self._weights, boundary, windows)

    def empty(self, boundary: int, layers: Iterable[int]) -> Gram:
        """Return zero-initialized sums for fitting the given layers at a boundary."""
        widths = {layer: self.shape.n_kv(layer) for layer in layers}
        kinds = self.projections[boundary]
        return Gram.empty(max(self._n_inputs(boundary, kind) for kind in kinds), widths)

    def add(self, sums: Sums, tapped: Tapped) -> None:
        """Add all rows except the first, whose predecessor is not available.

        All layers share the mean row weights of the last N_WEIGHING layers.
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
        """Solve for a layer's fit at a boundary. Raises FitError if the sums are unusable."""
        own = self._weights.own_projection(layer, self.shape.n_k[layer], self.shape.n_v[layer])
        fitted = fit.fit_layer(layer, gram.of_first(self._n_inputs(boundary, kind)), own, ridge)
        return fit.encode(layer, fitted, stored)

    def _n_inputs(self, boundary: int, kind: Projection) -> int:
        return self.shape.n_embd + self.shape.n_wide(boundary, kind)
