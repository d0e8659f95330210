"""Converted models, and helpers for tests of conversions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.fit.least_squares import KvType, encode
from pop_converter.fit.weights import KvProjection
from pop_converter.fit.wide import Neurons, WideInput, encode_input
from pop_converter.gguf.content import NewTensor
from pop_converter.popfile.format import Calibration, PopMeta
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_converter.popfile.rewrite import Fitted, convert
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from support.shapes import read_shape
from support.synthetic import make_gguf

# Used by tests that do not set them.
DEFAULTS = {"min_prompt": 34, "tail_tokens": 16}


def convert_default(src: Path, dst: Path, **options: object) -> PopMeta:
    """Convert at a third of the layers, with own projections."""
    return convert(make_plan(read_shape(src)), src, dst, **options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    """Return the file names in a folder."""
    return {path.name for path in folder.iterdir()}


def converted(source: Path, folder: Path, **plan: Any) -> Path:
    """Convert a model into a folder; `plan` is passed to make_plan."""
    target = folder / f"{source.stem}.pop.gguf"
    convert(make_plan(read_shape(source), **{**DEFAULTS, **plan}), source, target)
    return target


def tiny(folder: Path, arch: str = "llama", boundary: int = 4, **recipe: object) -> Path:
    """Build a random model of 8 layers that skips from `boundary`, with sink 1 and tail 16."""
    return converted(make_gguf(folder / f"{arch}.gguf", arch, **recipe), folder, boundary=boundary)


@dataclass(frozen=True)
class Pair:
    """A conversion in both forms: a single file, and a sidecar of `base`."""

    base: Path
    single: Path
    sidecar: Path


def paired(base: Path, folder: Path, projection: str, seed: int = 0, **plan: Any) -> Pair:
    full_plan = make_plan(
        read_shape(base), projection=Projection(projection), **{**DEFAULTS, **plan}
    )
    fitted = None if projection == "own" else made_up(full_plan, seed)
    pair = Pair(base, folder / "single.gguf", folder / f"{base.stem}.pop-sidecar.gguf")
    convert(full_plan, base, pair.single, fitted=fitted)
    write_sidecar(full_plan, base, pair.sidecar, fitted=fitted)
    return pair


def made_up(plan: Plan, seed: int = 0, kind: KvType = KvType.Q8_0, scale: float = 1.0) -> Fitted:
    """Return random projections with K/V of the given scale; wide ones if the plan has them."""
    rng = np.random.default_rng(seed)
    times = np.float32(scale)
    n_embd = plan.shape.n_embd
    n_prev, n_neurons = plan.shape.wide_inputs(plan.boundary)
    n_wide = plan.shape.n_wide(plan.boundary, plan.projection)

    def random(n_out: int, n_in: int) -> np.ndarray:
        return rng.standard_normal((n_out, n_in), np.float32) * np.float32(n_in**-0.5)

    tensors: list[NewTensor] = []
    gain = np.ones(n_embd, np.float32)
    if plan.projection == Projection.WIDE:
        gate, up = random(n_neurons, n_embd), random(n_neurons, n_embd)
        # Clamped neurons are also covered.
        neurons = Neurons(gain, gate, 6 * up, False) if n_neurons else None
        wide_input = WideInput(random(n_prev, n_embd), neurons)
        tensors += encode_input(plan.boundary, wide_input, kind)
    for layer in plan.fitted_layers:
        n_kv = plan.shape.n_kv(layer)
        weight, bias = random(n_kv, n_embd) * times, rng.standard_normal(n_kv, np.float32) * times
        wide = random(n_kv, n_wide) * times if n_wide else None
        tensors += encode(
            layer, KvProjection(gain, weight, bias, plan.shape.n_k[layer], wide), kind
        )
    calibration = Calibration("random", "0" * 64, 1, 0.0, "none")
    return Fitted(calibration, tuple(tensors), projection=plan.projection)
