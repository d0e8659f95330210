"""Calibrations as their tests make them, and a recorder of what the taps show."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.source import read_source
from pop_converter.popfile.plan import make_plan
from pop_converter.projection import Projection
from pop_local.calibration.activations import reading
from pop_local.calibration.job import Follow, calibrate
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import N_WINDOW
from pop_local.engine.llama.graph_macs import GraphMacs
from support.shapes import read_shape

OWN, FITTED, WIDE, ATTENTION = Projection

BOUNDARY, N_LAYER, N_TOKENS = 4, 8, 2048
ARCHS = ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"]
SILENT = Follow(lambda done, total: None, lambda done, total: None, lambda: False)


def stopped_at(n: int) -> Follow:
    """Says stop when it is asked for the n-th time."""
    asked = count(1)
    return replace(SILENT, should_stop=lambda: next(asked) == n)


class Recorder:
    """Keeps what the taps show."""

    def __init__(self) -> None:
        self.states: dict[int, list[np.ndarray]] = {}
        self.given: dict[int, list[np.ndarray]] = {}
        self.layers: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def state(self, boundary: int, rows: np.ndarray) -> None:
        self.states.setdefault(boundary, []).append(rows.copy())

    def heads(self, layer: int, rows: np.ndarray) -> None:
        self.given.setdefault(layer, []).append(rows.copy())

    def layer(self, layer: int, k: np.ndarray, v: np.ndarray, mass: np.ndarray) -> None:
        self.layers.setdefault(layer, []).append((k.copy(), v.copy(), mass.copy()))


def settings(text: Path, **others: object) -> FitOptions:
    made = FitOptions(N_TOKENS, text, kv_type=KvType.F32, memory_bytes=1 << 30)
    return replace(made, **others)  # type: ignore[arg-type]


def planned(path: Path, boundary: int = BOUNDARY, projection: Projection = FITTED):
    return make_plan(
        read_shape(path),
        boundary=boundary,
        sink_tokens=0,
        projection=projection,
        macs=GraphMacs(path),
    )


def fitted(
    path: Path, options: FitOptions, follow: Follow = SILENT, projection: Projection = FITTED
):
    [found] = fitted_at((BOUNDARY,), path, options, follow, (projection,))
    return found


def fitted_at(
    boundaries,
    path: Path,
    options: FitOptions,
    follow: Follow = SILENT,
    projections=(FITTED,),
):
    plans = [planned(path, boundary, each) for boundary in boundaries for each in projections]
    with LoadedModel(path, n_threads=1) as model:
        return calibrate(plans, model, read_source(path), options, follow).fitted


def recorded(path: Path, windows, boundaries=(BOUNDARY,), layers=(5, 6, 7), heads=()) -> Recorder:
    recorder = Recorder()
    shown = {"boundaries": boundaries, "layers": layers, "heads": heads}
    with (
        LoadedModel(path, n_threads=1) as model,
        reading(model, recorder, **shown, n_window=N_WINDOW) as opened,
    ):
        for window in windows:
            opened.window(window)
    return recorder


def words(folder: Path) -> Path:
    """A text that is long enough to fit a tiny model on, written in no time."""
    path = folder / "words.txt"
    path.write_text(" ".join(f"w{number}" for number in range(9000)))
    return path


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 384, n).tolist()
