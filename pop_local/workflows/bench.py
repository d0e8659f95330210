"""Time to first token with and without pruning, on the same weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.errors import PopError
from converter.shape import source_shape, trained_ctx
from converter.sidecar import pop_of
from converter.source import Source, read_source
from pop_local.engine.llama.backend import devices
from pop_local.engine.model import PopModel
from pop_local.measure.break_even import Tried, measure_break_even
from pop_local.measure.speed import N_DECODE, SpeedRow, measure_speed
from pop_local.models.files import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened
from pop_local.workflows.open import files_at_depth, model_files
from pop_local.workflows.options import Hardware


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and where.

    `n_longest`: tokens of the longest prompt. `n_pairs`: of runs for each length. `boundary` None:
    the file's. `n_batch`: tokens that are read at once. `n_ctx` None: what is measured needs.
    """

    n_longest: int
    n_pairs: int
    boundary: int | None
    n_batch: int
    n_ctx: int | None
    hardware: Hardware


@dataclass(frozen=True)
class Bench:
    """What was measured on: `backend` names the device and the threads.

    `is_exact`: the tokens that skip the layers from `boundary` on are of no use there.
    """

    model: str
    sidecar: str | None
    backend: str
    boundary: int
    is_exact: bool
    n_layer: int
    min_prompt: int


@dataclass(frozen=True)
class Speed:
    """The speed-ups by prompt length."""

    bench: Bench
    rows: tuple[SpeedRow, ...]


@dataclass(frozen=True)
class BreakEvenSearch:
    """The shortest prompt that gains, None when none does up to the longest tried."""

    bench: Bench
    n_prompt: int | None
    tried: tuple[Tried, ...]


def bench(
    model: str,
    sidecar: Path | None,
    n_prompts: Sequence[int],
    options: BenchOptions,
    watch: Watch,
) -> Speed:
    """Measure each prompt length. Raises PopError, StoppedError."""
    source, files = _found(model, sidecar, options, watch)
    shape = source_shape(source)
    with _opened(source, files, options, watch) as loaded:
        rows = measure_speed(loaded, shape, n_prompts, options.n_pairs, watch.stage("Measuring"))
        return Speed(_bench(source, files, loaded, options), rows)


def find_break_even(
    model: str, sidecar: Path | None, options: BenchOptions, watch: Watch
) -> BreakEvenSearch:
    """Search for the shortest prompt that gains. Raises PopError, StoppedError."""
    source, files = _found(model, sidecar, options, watch)
    if source_shape(source).exact:
        raise PopError(f"{files.path} loses nothing with any prompt: there is nothing to search")
    advance = watch.stage("Searching")
    n_tried = 0

    def tried(one: Tried) -> None:
        nonlocal n_tried
        n_tried += 1
        # Doubling up to the longest takes most of the steps.
        advance(n_tried, max(n_tried, options.n_longest.bit_length()))

    with _opened(source, files, options, watch) as loaded:
        found = measure_break_even(loaded, options.n_pairs, options.n_longest, tried)
        return BreakEvenSearch(_bench(source, files, loaded, options), found.n_prompt, found.tried)


def _found(
    model: str, sidecar: Path | None, options: BenchOptions, watch: Watch
) -> tuple[Source, ModelFiles]:
    find = model_files if options.boundary is None else files_at_depth
    files = find(model, sidecar, hardware=options.hardware, watch=watch)
    source = read_source(files.path)
    is_plain = pop_of(source, files.sidecar) is None and not source_shape(source).exact
    if options.boundary is None and is_plain:
        raise PopError(
            f"{files.path} is not converted: there is nothing to compare",
            "convert it, or choose a boundary",
            cause="nothing-to-compare",
            model=files.path,
        )
    return source, files


def _opened(source: Source, files: ModelFiles, options: BenchOptions, watch: Watch) -> PopModel:
    n_ctx, n_batch = _context(source, options), options.n_batch
    model = opened(files, options.hardware, watch, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch)
    if options.boundary is not None:
        model.set_boundary(options.boundary)
    return model


def _context(source: Source, options: BenchOptions) -> int:
    """The context to open, which must hold the longest prompt and what is decoded after it."""
    n_needed, trained = options.n_longest + N_DECODE, trained_ctx(source.first)
    what = f"the longest prompt takes {n_needed} tokens of context"
    if options.n_ctx is not None and options.n_ctx < n_needed:
        raise PopError(
            f"{what}, {options.n_ctx} are given",
            "give a larger context, or shorter prompts",
            cause="bench-context",
        )
    if trained is not None and trained < n_needed:
        raise PopError(
            f"{what}, the model has {trained}", "give shorter prompts", cause="bench-trained"
        )
    return options.n_ctx or n_needed


def _bench(source: Source, files: ModelFiles, model: PopModel, options: BenchOptions) -> Bench:
    found = devices()
    gpus = [device for device in found if device.is_gpu]
    device = gpus[0] if gpus and options.hardware.n_gpu_layers != 0 else found[-1]
    threads = "1 thread" if model.n_threads == 1 else f"{model.n_threads} threads"
    return Bench(
        model=str(files.path),
        sidecar=str(files.sidecar) if files.sidecar else None,
        backend=f"{device.name} ({device.description}), {threads}",
        boundary=model.boundary or model.exact,
        is_exact=model.exact > 0,
        n_layer=source_shape(source).n_layer,
        min_prompt=model.rule.min_prompt,
    )
