"""Run calibrations on tiny models and record the full model's results."""

import ctypes
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from pop_base.progress import Watch
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.projection import Projection
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import calibrate
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.llama.taps import Tapped, TapRequest
from support.ggml_library import Tensor
from support.shapes import read_shape

OWN, FITTED, WIDE = Projection

BOUNDARY, N_LAYER, N_TOKENS = 4, 8, 2048
WEIGHING = (4, 5, 6, 7)
ARCHS = ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"]


def stopped_at(n: int) -> Watch:
    """Return callbacks that request a stop at the n-th check."""
    checks = count(1)
    return Watch(should_stop=lambda: next(checks) == n)


def attention(path: Path, tokens: Sequence[int], layers: Sequence[int]) -> list[np.ndarray]:
    """Return the full model's attention weights of some layers: each [n_head, n_rows, n_rows]."""
    scores: dict[bytes, np.ndarray] = {}

    def see(address: int, is_asked: bool, _: object) -> bool:
        tensor = Tensor.from_address(address)
        if tensor.name in names and not is_asked:
            shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
            raw = (ctypes.c_uint8 * (tensor.nb[3] * tensor.ne[3])).from_address(tensor.data)
            scores[tensor.name] = np.ndarray(shape, np.float32, raw, strides=strides)[0].copy()
        return True

    n, names = len(tokens), [b"kq_soft_max-%d" % layer for layer in layers]
    callback = bindings().ggml_backend_sched_eval_callback(see)
    sizes = {"n_ctx": n, "n_batch": n, "n_ubatch": n, "flash_attn_type": 0}
    with (
        loaded(path, n_threads=1) as context,
        context.extra_context(**sizes, cb_eval=callback) as ctx,
        closing(TokenBatch(n)) as batch,
    ):
        assert batch.decode(ctx, tokens, 0, Outputs.NONE) == 0
    return [scores[name][:, :n, :n].astype(np.float64) for name in names]


def settings(text: Path, **others: object) -> FitOptions:
    options = FitOptions(N_TOKENS, (text,), kv_type=KvType.F32, memory_bytes=1 << 30)
    return replace(options, **others)  # type: ignore[arg-type]


def planned(path: Path, boundary: int = BOUNDARY, projection: Projection = FITTED):
    return make_plan(
        read_shape(path),
        boundary=boundary,
        sink_tokens=0,
        projection=projection,
        macs=GraphMacs(path),
    )


def fitted(
    path: Path, options: FitOptions, watch: Watch = Watch(), projection: Projection = FITTED
):
    [result] = fitted_at((BOUNDARY,), path, options, watch, (projection,))
    return result


def fitted_at(
    boundaries,
    path: Path,
    options: FitOptions,
    watch: Watch = Watch(),
    projections=(FITTED,),
):
    plans = [
        planned(path, boundary, projection) for boundary in boundaries for projection in projections
    ]
    with loaded(path, n_threads=1) as context:
        return calibrate(plans, context, read_source(path), options, watch)


def recorded(path: Path, windows, boundaries=(BOUNDARY,), layers=(5, 6, 7)) -> list[Tapped]:
    request = TapRequest(boundaries, layers, WEIGHING)
    with loaded(path, n_threads=1) as context:
        reading = WindowReader(context, request)
        return [reading.window(window) for window in windows]


def kv(taps: Sequence[Tapped], layer: int) -> np.ndarray:
    """Return a layer's K and V, [n, n_k + n_v], without each window's first row."""
    return np.concatenate([np.hstack([tap.k[layer], tap.v[layer]])[1:] for tap in taps])


def weights(taps: Sequence[Tapped], layer: int) -> np.ndarray:
    """Return a layer's token weights, without each window's first token."""
    return np.concatenate([fit.token_weights(tap.mass[layer][1:]) for tap in taps])


def words(folder: Path) -> Path:
    """Write a text that is long enough to fit a tiny model and fast to generate."""
    path = folder / "words.txt"
    path.write_text(" ".join(f"w{number}" for number in range(9000)))
    return path


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 384, n).tolist()
