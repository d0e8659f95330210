"""The calibration of a plan: what it needs, and the pass that does it."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pop_converter import fit
from pop_converter.content import NewTensor
from pop_converter.fit import Gram, KvType, Weighting
from pop_converter.format import Calibration
from pop_converter.plan import Plan
from pop_converter.rewrite import Fitted
from pop_converter.source import Source
from pop_converter.weights import Weights

from pop_local.calibration.state import State, load, save
from pop_local.calibration.texts import (
    N_WINDOW,
    CalibrationText,
    given_text,
    n_windows,
    own_text,
    read_text,
)
from pop_local.engine.activations import Rows, reading
from pop_local.engine.loaded import LoadedModel

Progress = Callable[[int, int], object]
# Python with numpy and llama.cpp, before any model.
_BASE_BYTES = 300 * 10**6
# A state takes gigabytes for a large model.
SAVE_EVERY_S = 60.0


class CalibrationStoppedError(Exception):
    """The caller's `should_stop` said so."""


@dataclass(frozen=True)
class Settings:
    """How to calibrate. `text` None: what is at hand. `state_path`: where a stopped run is kept."""

    n_tokens: int
    text: Path | None = None
    ridge: float = fit.RIDGE
    weighting: Weighting = Weighting.ATTENTION
    kv_type: KvType = KvType.Q8_0
    memory_bytes: int = 1 << 30
    state_path: Path | None = None


@dataclass(frozen=True)
class Needs:
    """What a calibration takes. `groups`: the layers of each pass over the text.

    `sums_bytes`: the Gram matrices of the largest group and the work on them; `total_bytes`: the
    whole process, weights twice since the backend may repack them.
    """

    groups: tuple[tuple[int, ...], ...]
    sums_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Watch:
    """Who is told how far it is (done_tokens, total_tokens), and who may end it."""

    on_sampling: Progress
    on_reading: Progress
    should_stop: Callable[[], bool]


def plan_needs(plan: Plan, source: Source, memory_bytes: int) -> Needs:
    """Group the layers so that their sums stay below `memory_bytes` (one layer at least)."""
    shape = plan.shape
    widths = {layer: shape.kv_macs[layer] // shape.n_embd for layer in plan.fitted_layers}
    scratch = max(fit.scratch_bytes(shape.n_embd, n_kv, N_WINDOW) for n_kv in widths.values())
    groups: list[list[int]] = [[]]
    sizes = [0]
    for layer, n_kv in widths.items():
        size = fit.gram_bytes(shape.n_embd, n_kv)
        if groups[-1] and sizes[-1] + size + scratch > memory_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(layer)
        sizes[-1] += size
    n_sums = max(sizes) + scratch
    n_stored = 4 * sum(shape.n_embd * n_kv for n_kv in widths.values())
    n_heads = max(dim // 64 for dim in shape.attn_dim)
    buffers = 4 * N_WINDOW * (shape.n_vocab + 8 * shape.n_embd + 2 * n_heads * N_WINDOW)
    total = n_sums + n_stored + 2 * source.size_bytes + buffers + _BASE_BYTES
    return Needs(tuple(map(tuple, groups)), n_sums, total)


def calibrate(
    plan: Plan, model: LoadedModel, source: Source, settings: Settings, watch: Watch
) -> Fitted:
    """Fit the projections of all skipped layers but the first.

    Raises PopError, and CalibrationStoppedError; with `state_path` the next call goes on then.
    """
    return _Job(plan, model, source, settings, watch).run()


class _Job:
    """One calibration; observes the model's layers as they are computed (engine.activations)."""

    def __init__(
        self, plan: Plan, model: LoadedModel, source: Source, settings: Settings, watch: Watch
    ) -> None:
        self._plan, self._model, self._settings, self._watch = plan, model, settings, watch
        self._groups = plan_needs(plan, source, settings.memory_bytes).groups
        self._weights = Weights(source)
        self._eps = _rms_epsilon(source)
        self._identity = _identity(plan, source, settings, self._groups)
        self._saved_s = time.monotonic()
        self._x: Rows = np.empty((0, 0), np.float32)

    def run(self) -> Fitted:
        path = self._settings.state_path
        self._state = (path and load(path, self._identity)) or State(self._text())
        while self._state.group < len(self._groups):
            self._read(self._groups[self._state.group])
            for layer, gram in self._state.grams.items():
                self._state.tensors += self._solved(layer, gram)
            self._state.grams.clear()
            self._state.group += 1
            self._state.n_done = 0
        if path:
            path.unlink(missing_ok=True)
        return Fitted(self._calibration(), tuple(self._state.tensors))

    def _text(self) -> CalibrationText:
        settings, n_embd = self._settings, self._plan.shape.n_embd
        count = n_windows(settings.n_tokens, n_embd)
        if settings.text:
            return given_text(self._model, settings.text, count, n_embd)
        return own_text(self._model, count, self._sampled)

    def _sampled(self, done: int, total: int) -> None:
        self._watch.on_sampling(done, total)
        if self._watch.should_stop():
            raise CalibrationStoppedError

    def _read(self, layers: Sequence[int]) -> None:
        state, shape = self._state, self._plan.shape
        for layer in layers:
            n_kv = shape.kv_macs[layer] // shape.n_embd
            state.grams.setdefault(layer, Gram(shape.n_embd, n_kv))
        n_all = len(state.text.windows)
        with reading(
            self._model, self, boundaries=(self._plan.boundary,), layers=layers, n_window=N_WINDOW
        ) as opened:
            while state.n_done < n_all:
                opened.window(state.text.windows[state.n_done].tolist())
                state.n_done += 1
                n_read = state.group * n_all + state.n_done
                self._watch.on_reading(n_read * N_WINDOW, len(self._groups) * n_all * N_WINDOW)
                self._keep()

    def _keep(self) -> None:
        stopping = self._watch.should_stop()
        path = self._settings.state_path
        if path and (stopping or time.monotonic() - self._saved_s > SAVE_EVERY_S):
            save(path, self._identity, self._state)
            self._saved_s = time.monotonic()
        if stopping:
            raise CalibrationStoppedError

    # The observer: position 0 is left out, since the first token always runs in full.

    def state(self, boundary: int, rows: Rows) -> None:
        self._x = fit.with_bias(rows[1:], self._eps)

    def layer(self, layer: int, k: Rows, v: Rows, mass: Rows) -> None:
        y = np.concatenate([k, v], axis=1)[1:]
        weights = fit.token_weights(mass[1:], self._settings.weighting)
        self._state.grams[layer].add(self._x, y, weights)

    def _solved(self, layer: int, gram: Gram) -> tuple[NewTensor, ...]:
        own = self._weights.own_projection(layer, gram.xy.shape[1])
        fitted = fit.fit_layer(layer, gram, own, self._settings.ridge)
        return fit.encode(fitted, self._settings.kv_type)

    def _calibration(self) -> Calibration:
        text, settings = self._state.text, self._settings
        return Calibration(
            text.name, text.sha256, text.n_tokens, settings.ridge, settings.weighting.value
        )


def _rms_epsilon(source: Source) -> float:
    arch = source.first.get("general.architecture")
    value = source.first.get(f"{arch}.attention.layer_norm_rms_epsilon")
    return value if isinstance(value, float) else 0.0


def _identity(
    plan: Plan, source: Source, settings: Settings, groups: tuple[tuple[int, ...], ...]
) -> str:
    """Differs wherever two calibrations would: model, schedule, text, settings."""
    parts: list[object] = [part.path.stat().st_mtime_ns for part in source.parts]
    if settings.text:
        parts.append(hashlib.sha256(read_text(settings.text).encode()).hexdigest())
    parts += [source.name, source.size_bytes, plan.schedule, groups, settings.n_tokens]
    parts += [settings.ridge, settings.weighting.value, settings.kv_type.value]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
