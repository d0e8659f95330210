"""Fit skipped layers' K/V projections to the full model's K and V by least squares.

Each fit solves a weighted least-squares problem in float64. A ridge penalty pulls the solution
toward the layer's own projections. The fit needs only Gram matrices. Let x be the normalized
boundary state, and let X = [x, 1]. Y contains the full model's K and V. D is the diagonal matrix of
token weights, and W0 contains the layer's own projections:

    W = W0 + (X'DX + ridge)^-1 X'D (Y - X W0)

The stored weight is W / gain, because the backend multiplies it by gain * x. The ridge is
proportional to diag(X'DX), so the gain does not affect the solution.

A wide fit (fit/wide.py) adds the inputs z, so X = [x, z, 1]. The ridge pulls the weights of z
toward zero. A wide fit's Gram matrices contain the plain fit's Gram matrices.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_converter.fit.weights import Floats, KvProjection
from pop_converter.gguf.content import NewTensor

Doubles = NDArray[np.float64]

RIDGE = 1e-3
BIAS_RIDGE = 1e-6
# Number of rows of a triangular system to solve at once.
_BLOCK = 128
# Inputs with less than this share of the mean power have a larger ridge. Otherwise, dividing by
# their small gain would yield large weights, which would ruin their quantization block's scale.
_WEAK_INPUT = 1e-4
# Minimum token weight, and maximum attention as a multiple of the mean.
LEAST_WEIGHT = 0.2
_MOST_ATTENTION = 50.0
# The diagonal is scaled to 1, so smaller pivots are rounding errors.
_LEAST_PIVOT = 1e-12
DAMAGED_HINT = "the model file may be damaged: check that the model can answer a prompt"


class FitError(PopError):
    """Error raised if no fit can be computed from the activations."""


class KvType(str, Enum):
    """Storage type of fitted weights."""

    Q8_0 = "q8_0"
    F16 = "f16"
    F32 = "f32"
    Q4_0 = "q4_0"

    @property
    def ggml(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.name]


@dataclass(eq=False)
class Gram:
    """Gram matrices for all fits at one boundary.

    `xx` is X'DX [n_inputs + 1, n_inputs + 1]. `xy` maps layers to X'DY [n_inputs + 1, n_k + n_v].
    The last input is constant. `n_rows` is the number of summed rows. float32 is precise enough
    because the ridge far exceeds the rounding error.
    """

    xx: Floats
    xy: dict[int, Floats]
    n_rows: int = 0

    @classmethod
    def empty(cls, n_inputs: int, n_kv: Mapping[int, int]) -> "Gram":
        """Return empty sums. `n_kv` maps layers to n_k + n_v."""
        n = n_inputs + 1
        xy = {layer: np.zeros((n, width), np.float32) for layer, width in n_kv.items()}
        return cls(np.zeros((n, n), np.float32), xy)

    def add(self, x: Floats, y: Mapping[int, Floats], weights: Floats) -> None:
        """Add a window's inputs `x` [n, n_inputs + 1] with token `weights` [n].

        `y` maps layers, including all layers in `xy`, to K and V [n, n_k + n_v].
        """
        root = np.sqrt(weights)[:, None]
        weighted = x * root
        # numpy computes the product of a matrix and its transpose with half the work (syrk).
        self.xx += weighted.T @ weighted
        for layer, xy in self.xy.items():
            xy += weighted.T @ (y[layer] * root)
        self.n_rows += len(x)

    def of_first(self, n_inputs: int) -> "Gram":
        """Return the sums for the first `n_inputs` inputs and the constant input."""
        kept = np.append(np.arange(n_inputs), len(self.xx) - 1)
        if kept.size == len(self.xx):
            return self
        xy = {layer: sums[kept] for layer, sums in self.xy.items()}
        return Gram(self.xx[np.ix_(kept, kept)], xy, self.n_rows)


def scratch_bytes(n_inputs: int, n_kv: int, n_rows: int) -> int:
    """Return the peak scratch memory, in bytes, for adding `n_rows` rows or solving a layer."""
    n = n_inputs + 1
    adding = 4 * (n * (n + n_kv) + 4 * n_rows * (n + n_kv))
    solving = 8 * (3 * n**2 + 6 * n * n_kv)
    return max(adding, solving)


def normalised(state: Floats, eps: float) -> Floats:
    """Divide each state [n, n_embd] by its root mean square."""
    rms = np.sqrt(np.mean(np.square(state, dtype=np.float64), axis=1, keepdims=True) + eps)
    return np.asarray(state / rms, np.float32)


def with_bias(*inputs: Floats) -> Floats:
    """Concatenate inputs [n, n_i] and append a column of ones."""
    return np.hstack([*inputs, np.ones((len(inputs[0]), 1), np.float32)])


def token_weights(mass: Floats) -> Floats:
    """Compute token weights [n] from the attention `mass` [n] that each token receives."""
    mean = float(mass.mean())
    if mean <= 0:
        return np.ones_like(mass)
    share = np.clip(mass / mean, 0, _MOST_ATTENTION)
    return np.asarray(LEAST_WEIGHT + (1 - LEAST_WEIGHT) * share, np.float32)


def fit_layer(layer: int, gram: Gram, own: KvProjection, ridge: float = RIDGE) -> KvProjection:
    """Fit a layer's projections, starting from `own` (its own projections or an earlier fit).

    `ridge` is the strength of the pull toward `own`, relative to the diagonal of X'DX. Raises
    FitError if the sums are not finite or X'DX is singular.
    """
    xy = gram.xy[layer]
    if not (np.isfinite(gram.xx).all() and np.isfinite(xy).all()):
        raise FitError(
            f"the activations for layer {layer} are not finite", DAMAGED_HINT, cause="not-finite"
        )
    gain = own.gain.astype(np.float64)
    n_embd, n_wide = gain.size, len(gram.xx) - gain.size - 1
    own_wide = np.zeros((own.bias.size, n_wide), np.float32) if own.wide is None else own.wide
    start: Doubles = np.vstack([gain[:, None] * own.weight.T, own_wide.T, own.bias])
    xx = gram.xx.astype(np.float64)
    delta = _solve(xx, xy - xx @ start, _ridge(xx, gain, ridge))
    used = gain != 0
    step = np.zeros((n_embd, own.bias.size))
    step[used] = delta[:n_embd][used] / gain[used, None]
    weight = (own.weight + step.T).astype(np.float32)
    bias = (own.bias + delta[-1]).astype(np.float32)
    wide = np.ascontiguousarray(own_wide + delta[n_embd:-1].T, np.float32)
    if not all(np.isfinite(part).all() for part in (weight, wide, bias)):
        raise FitError(
            f"the fit for layer {layer} contains NaN or infinity", "use more or different text"
        )
    return replace(own, weight=weight, bias=bias, wide=wide if n_wide else None)


def _ridge(xx: Doubles, gain: Doubles, ridge: float) -> Doubles:
    """Return each input's ridge, relative to the input's diagonal element in X'DX."""
    seen = gain**2 * xx.diagonal()[: gain.size]
    weak = _WEAK_INPUT * seen.mean()
    raised = np.maximum(1, weak / np.maximum(seen, 1e-30 * weak + 1e-300))
    n_wide = len(xx) - gain.size - 1
    return np.concatenate([ridge * raised, np.full(n_wide, ridge), [BIAS_RIDGE]])


def _solve(xx: Doubles, rest: Doubles, ridge: Doubles) -> Doubles:
    """Solve (xx + diag(ridge * diag(xx))) solution = rest. Overwrites `xx`.

    Raises FitError if the matrix is numerically singular.
    """
    power = xx.diagonal().copy()
    scale: Doubles = np.asarray(1 / np.sqrt(np.where(power > 0, power, 1)), np.float64)
    xx *= scale
    xx *= scale[:, None]
    xx[np.diag_indices_from(xx)] = np.where(power > 0, 1 + ridge, 1)
    lower: Doubles | None = None
    with suppress(np.linalg.LinAlgError):
        lower = np.asarray(np.linalg.cholesky(xx), np.float64)
    if lower is None or lower.diagonal().min() ** 2 < _LEAST_PIVOT:
        raise FitError(
            "the Gram matrix is singular",
            "use more varied text for the fit, or a larger ridge penalty",
            cause="singular",
        )
    solution = rest * scale[:, None]
    _solve_triangles(lower, solution)
    return np.asarray(solution * scale[:, None], np.float64)


def _solve_triangles(lower: Doubles, x: Doubles) -> None:
    """Replace x with (lower lower')^-1 x in blocks, because numpy has no triangular solver."""
    parts = [slice(at, at + _BLOCK) for at in range(0, len(x), _BLOCK)]
    for part in parts:
        x[part] -= lower[part, : part.start] @ x[: part.start]
        x[part] = np.linalg.solve(lower[part, part], x[part])
    for part in reversed(parts):
        x[part] -= lower[part.stop :, part].T @ x[part.stop :]
        x[part] = np.linalg.solve(lower[part, part].T, x[part])


def encode(layer: int, fitted: KvProjection, kind: KvType) -> tuple[NewTensor, ...]:
    """Encode a layer's fit as four tensors, or as six tensors for a wide fit."""
    tensors = []
    for part, rows in (("k", slice(fitted.n_k)), ("v", slice(fitted.n_k, None))):
        name = f"blk.{layer}.pop_attn_{part}"
        bias = fitted.bias[rows]
        tensors.append(encode_weight(f"{name}.weight", fitted.weight[rows], kind))
        tensors.append(NewTensor(f"{name}.bias", bias.shape, 0, bias.tobytes()))
        if fitted.wide is not None:
            tensors.append(encode_weight(f"{name}_wide.weight", fitted.wide[rows], kind))
    return tuple(tensors)


def decode(layer: int, tensors: Mapping[str, NewTensor], own: KvProjection) -> KvProjection:
    """Decode the tensors that `encode` returned. `own` contains the layer's own projections."""
    parts = [f"blk.{layer}.pop_attn_{part}" for part in "kv"]
    biases = [np.frombuffer(tensors[f"{name}.bias"].data, np.float32) for name in parts]
    weights = [decode_weight(tensors[f"{name}.weight"]) for name in parts]
    wide = [tensors[f"{name}_wide.weight"] for name in parts if f"{name}_wide.weight" in tensors]
    return replace(
        own,
        weight=np.vstack(weights),
        bias=np.concatenate(biases),
        wide=np.vstack([decode_weight(tensor) for tensor in wide]) if wide else None,
    )


def decode_weight(tensor: NewTensor) -> Floats:
    """Dequantize a stored [n_out, n_in] matrix."""
    kind = GGMLQuantizationType(tensor.type)
    rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.dims[-1], -1)
    return np.asarray(dequantize(rows, kind), np.float32)


def encode_weight(name: str, weight: Floats, kind: KvType) -> NewTensor:
    """Encode an [n_out, n_in] matrix in the given storage type."""
    data = quantize(weight, kind.ggml).tobytes()
    return NewTensor(name, weight.shape[::-1], kind.ggml, data)
