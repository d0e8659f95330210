"""Sums for fitting projections at given boundaries, and the file that stores a model's sums.

`convert` adds rows from text windows, and online_calibrator.py adds rows from prompts. The sums do
not depend on the rows' source. A sums file contains sums over thousands of rows, but no individual
rows or tokens. Only the folder's owner can read sums files (docs/learning.md).
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from pop_converter.architecture.shape import ModelShape
from pop_converter.base.errors import DAMAGED_ARCHIVE, PopError, WriteError
from pop_converter.base.output_file import make_private, replacing
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import DAMAGED_HINT, FitError, Gram, KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import Neurons, WideInput, decode_input, wide_input
from pop_converter.gguf.content import NewTensor
from pop_converter.gguf.source import Source, sampled_sha256
from pop_converter.projection import Projection
from pop_local.engine.llama.taps import Rows, Tapped, TapRequest
from pop_local.models.sidecars import LearnedFiles

log = logging.getLogger("pop_local.learning")

T = TypeVar("T")
# Version of the sums file format.
_VERSION = 1

# Number of last layers whose attention determines the row weights.
N_WEIGHING = 4


@dataclass
class Sums:
    """Gram matrices keyed by boundary. `wides`: the additional inputs of the wide fits."""

    wides: dict[int, WideInput] = field(default_factory=dict)
    grams: dict[int, Gram] = field(default_factory=dict)

    def has_same_input(self, other: "Sums", boundary: int) -> bool:
        """Return True if both sets of sums were computed from the same inputs."""
        ours, theirs = self.wides.get(boundary), other.wides.get(boundary)
        if ours is None or theirs is None:
            return ours is theirs
        return bool(np.array_equal(ours.previous, theirs.previous))

    def merge(self, other: "Sums") -> None:
        """Add newer sums to these sums.

        If the inputs at a boundary differ, a warning is logged and the newer sums are dropped.
        """
        for boundary, wide in other.wides.items():
            if boundary not in self.grams:
                self.wides.setdefault(boundary, wide)
        for boundary, gram in other.grams.items():
            mine = self.grams.get(boundary, gram)
            ours, theirs = ({at: xy.shape for at, xy in each.xy.items()} for each in (mine, gram))
            if ours != theirs or not self.has_same_input(other, boundary):
                log.warning("dropped %d new rows because their inputs have changed", gram.n_rows)
            elif mine is gram:
                self.grams[boundary] = gram
            else:
                mine.merge(gram)

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Convert the sums to a JSON header and named arrays (the inverse of `of`)."""
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
        """Rebuild sums from the results of `arrays`."""
        sums = cls(stored_inputs(head, arrays))
        for boundary, layers, n_rows in head["grams"]:
            xx = _floats(arrays, f"xx.{boundary}")
            xy = {layer: _floats(arrays, f"xy.{boundary}.{layer}") for layer in layers}
            if any(len(each) != len(xx) for each in (xx.T, *xy.values())):
                raise ValueError(f"the sums for layer {boundary} have inconsistent shapes")
            sums.grams[boundary] = Gram(xx, xy, n_rows)
        return sums


def stored_inputs(head: Any, arrays: Any) -> dict[int, WideInput]:
    """Rebuild the wide fits' additional inputs from the output of `Sums.arrays`."""
    wides = {}
    for boundary, is_gelu in head["wides"]:
        neurons = None
        if is_gelu is not None:
            names = (f"{part}.{boundary}" for part in ("gain", "gate", "up"))
            gain, gate, up = (_floats(arrays, name) for name in names)
            neurons = Neurons(gain, gate, up, is_gelu)
        wides[boundary] = WideInput(_floats(arrays, f"previous.{boundary}"), neurons)
    return wides


def _floats(arrays: Any, name: str) -> np.ndarray:
    """Return a stored vector or matrix. Raises ValueError unless all values are finite floats."""
    found: np.ndarray = arrays[name]
    if found.dtype.kind != "f" or found.ndim not in (1, 2) or not np.isfinite(found).all():
        raise ValueError(f"{name} is not a matrix of finite numbers")
    return found


def _read_head(arrays: Any) -> Any:
    """Return a sums file's header. Raises an exception if the content is invalid."""
    head = json.loads(str(arrays["head"]))
    numbers = [number for boundary, layers, n in head["grams"] for number in (boundary, n, *layers)]
    numbers += [boundary for boundary, _ in head.get("wides", ())]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in numbers):
        raise ValueError("the header contains invalid numbers")
    if not isinstance(named := head.get("kinds", {}), dict):
        raise ValueError("the header's `kinds` field is not an object")
    for boundary, kinds in named.items():
        int(boundary), list(map(Projection, kinds))
    return head


@dataclass(frozen=True)
class Known:
    """The header of a sums file, and the additional inputs of its wide fits."""

    head: Any
    wides: dict[int, WideInput]

    @property
    def n_rows(self) -> dict[int, int]:
        return {boundary: n_rows for boundary, _, n_rows in self.head["grams"]}

    @property
    def kinds(self) -> dict[int, list[str]]:
        return {int(boundary): kinds for boundary, kinds in self.head.get("kinds", {}).items()}


@dataclass(frozen=True)
class SumsFile:
    """The file with the sums learned for a model. Multiple processes may add sums to the file.

    `model`: the model's hash. `n_embd`: the model's embedding width, or None to skip the check.
    """

    path: Path
    model: str
    n_embd: Any = None

    @classmethod
    def of(cls, source: Source) -> "SumsFile":
        """Return the SumsFile for a model. The file itself may not exist yet."""
        n_embd = source.first.of_arch("embedding_length")
        return cls(LearnedFiles.of(source).sums, sampled_sha256(source), n_embd)

    def load(self) -> Sums:
        """Return the stored sums, if any. An unusable file is renamed to *.damaged."""
        return self._read(Sums.of) or Sums()

    def known(self) -> Known:
        """Return the header and the wide fits' additional inputs without loading the sums."""
        found = self._read(lambda head, arrays: Known(head, stored_inputs(head, arrays)))
        return found or Known({"grams": []}, {})

    def _read(self, take: Callable[[Any, Any], T]) -> T | None:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                head = _read_head(arrays)
                if (head["version"], head["model"]) == (_VERSION, self.model):
                    for wide in stored_inputs(head, arrays).values():
                        if self.n_embd is not None and wide.previous.shape[1:] != (self.n_embd,):
                            raise ValueError("the inputs have the wrong width")
                    return take(head, arrays)
                log.warning(
                    "%s is from a different model or version, so learning starts over", self.path
                )
        except FileNotFoundError:
            return None
        except DAMAGED_ARCHIVE as error:
            # After a system error, which has an errno, the file may be intact. Errors from numpy
            # have no errno.
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise PopError(f"{self.path} cannot be read at the moment: {error}") from error
            log.warning("%s is damaged, so learning starts over: %s", self.path, error)
        with suppress(OSError):
            self.path.replace(self.path.with_suffix(".damaged"))
        return None

    def add(self, sums: Sums, kinds: dict[int, list[Projection]]) -> None:
        """Add sums for the given projection kinds to the file (see Sums.merge).

        Raises PopError if writing fails.
        """
        try:
            make_private(self.path.parent)
            with FileLock(self.path.with_suffix(".lock")):
                self._add(sums, kinds)
        except OSError as error:
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error

    def _add(self, sums: Sums, kinds: dict[int, list[Projection]]) -> None:
        every = self.load()
        every.merge(sums)
        head, arrays = every.arrays()
        known = self.known().kinds
        named = {str(each): known.get(each) or kinds.get(each, []) for each in every.grams}
        head |= {"version": _VERSION, "model": self.model, "kinds": named}
        with replacing(self.path, force=True) as file:
            with suppress(OSError):
                Path(file.name).chmod(0o600)
            np.savez(file, head=json.dumps(head), **arrays)


class Summing:
    """A solver that accumulates sums over a model's rows and computes fits from them."""

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        projections: Mapping[int, Sequence[Projection]],
        start: Mapping[str, NewTensor] | None = None,
    ) -> None:
        """`projections`: the kinds of fits at each boundary, excluding `Projection.OWN`.

        `start`: the fit that the ridge penalty pulls toward (None: the layers' own projections).
        """
        self.shape, self.projections = shape, projections
        self._start = start or {}
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

    def start_input(self, boundary: int) -> WideInput:
        """Return the additional inputs that the `start` fit uses at a boundary."""
        return decode_input(self.shape, self._weights, boundary, self._start)

    def choose_input(self, boundary: int, windows: Sequence[Rows]) -> WideInput:
        """Choose a wide fit's additional inputs from the normalized states of the given windows."""
        return wide_input(self.shape, self._weights, boundary, windows)

    def empty(self, boundary: int, layers: Iterable[int]) -> Gram:
        """Return zero-initialized sums for fitting the given layers at a boundary."""
        widths = {layer: self.shape.n_kv(layer) for layer in layers}
        kinds = self.projections[boundary]
        return Gram.empty(max(self._n_inputs(boundary, kind) for kind in kinds), widths)

    def add(self, sums: Sums, tapped: Tapped, scale: Rows | None = None) -> None:
        """Add all rows except the first, whose predecessor is not available.

        All layers share the mean row weights of the last N_WEIGHING layers. Deep passes do not
        change sums at shallower boundaries. `scale` [n_rows] multiplies the weights (default: 1).
        """
        y = {layer: np.hstack([k, tapped.v[layer]])[1:] for layer, k in tapped.k.items()}
        weights = [fit.token_weights(mass[1:]) for mass in tapped.mass.values()]
        mean = np.mean(weights, axis=0) if weights else np.ones(tapped.n_rows - 1, np.float32)
        if scale is not None:
            mean = mean * scale[1:]
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
        if self._start:
            own = fit.decode(layer, self._start, own)
        fitted = fit.fit_layer(layer, gram.of_first(self._n_inputs(boundary, kind)), own, ridge)
        return fit.encode(layer, fitted, stored)

    def _n_inputs(self, boundary: int, kind: Projection) -> int:
        return self.shape.n_embd + self.shape.n_wide(boundary, kind)
