"""Benchmark the time to first token with and without pruning, on the same weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pop_base.errors import PopError
from pop_base.progress import Watch, counting
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.devices import cpu_kernels, devices, has_kernels
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import (
    N_DECODE,
    Run,
    SpeedRow,
    measure_speed,
    run,
    run_rounds,
    text_prompt,
)
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import not_converted, opened
from pop_local.workflows.open import model_files

# The values of llama.cpp's options `repack` and `flash_attn` for each compared setting.
_SETTINGS = {
    "flash attention": (True, True),
    "no flash attention": (True, False),
    "flash attention, no repacking": (False, True),
    "no flash attention, no repacking": (False, False),
}
# Maximum length in tokens of the prompt with which llama.cpp's settings are compared.
_N_TRIED = 512


@dataclass(frozen=True)
class BenchOptions:
    """Options for a benchmark.

    `n_prompts` lists the prompt lengths in tokens. `n_pairs` is the number of pairs of runs (full
    and pruned) per length. `deep_rows` defaults to the file's rule, and `n_ctx` to the length
    that the prompts require.
    """

    n_prompts: tuple[int, ...]
    n_pairs: int
    n_ctx: int | None
    hardware: Hardware
    deep_rows: DeepRows | None = None


@dataclass(frozen=True)
class Speed:
    """The measured speedup for each prompt length, and the measurement conditions.

    `backend` is the device's name and the number of threads. `kernels` is the result of
    `cpu_kernels` ("" on a GPU). `is_exact` is true if pruning does not change the output.
    `upstream` is the name of the fastest llama.cpp setting without pop-local's kernels, if known.
    """

    model: str
    sidecar: str | None
    backend: str
    kernels: str
    boundary: int
    is_exact: bool
    n_layer: int
    min_prompt: int
    upstream: str | None
    rows: tuple[SpeedRow, ...]


def bench(model: str, sidecar: Path | None, options: BenchOptions, watch: Watch) -> Speed:
    """Measure the speed at each prompt length. Raises PopError or StoppedError."""
    with _opened(model, sidecar, options, watch) as (loaded, files):
        backend, kernels = _backend(loaded, options.hardware)
        sequence = loaded.engine.sequences[0]
        is_ours = kernels and has_kernels()
        with _upstream(loaded, options, watch) if is_ours else nullcontext((None, None)) as fastest:
            setting, read = fastest
            rows = measure_speed(
                *(loaded, options.n_prompts, options.n_pairs, watch.stage("Measuring"), read),
                on_row=lambda row: watch.on_note(row.in_words),
            )
        return Speed(
            model=str(files.path),
            sidecar=str(files.sidecar) if files.sidecar else None,
            backend=backend,
            kernels=kernels,
            boundary=sequence.settings.boundary or sequence.settings.exact,
            is_exact=sequence.settings.exact > 0,
            n_layer=loaded.engine.context.files.shape.n_layer,
            min_prompt=sequence.rule.min_prompt,
            upstream=setting,
            rows=rows,
        )


@contextmanager
def _upstream(
    model: PopModel, options: BenchOptions, watch: Watch
) -> Iterator[tuple[str, Callable[[Prompt], Run]]]:
    """Yield llama.cpp's fastest setting, and a function that runs a prompt with this setting."""

    def reading(name: str) -> AbstractContextManager[PopModel]:
        repack, flash_attn = _SETTINGS[name]
        return PopModel(
            EngineOptions.of(
                model.engine.context.files.path,
                kernels=False,
                repack=repack,
                flash_attn=flash_attn,
                n_ctx=model.engine.context.n_ctx,
                n_threads=model.engine.context.n_threads,
                n_gpu_layers=0,
            )
        )

    prompt, times_s = text_prompt(model, min(_N_TRIED, max(options.n_prompts))), {}
    tried = counting(len(_SETTINGS), watch.stage("Trying llama.cpp's settings"))
    for name in _SETTINGS:  # only one copy of the model is open at a time, to save memory
        with reading(name) as other:
            times_s[name] = run_rounds([partial(run, other, Mode.OFF, prompt)], 1)[0][0].ttft_s
        tried(1)
    best = min(times_s, key=lambda name: times_s[name])
    with reading(best) as other:
        yield best, partial(run, other, Mode.OFF)


@contextmanager
def _opened(
    model: str, sidecar: Path | None, options: BenchOptions, watch: Watch
) -> Iterator[tuple[PopModel, ModelFiles]]:
    files = model_files(model, sidecar, watch)
    source = read_source(files.path)
    if pop_of(source, files.sidecar) is None and not source_shape(source).exact:
        why = ", so there is nothing to compare"
        raise not_converted(model=files.path, cause="nothing-to-compare", consequence=why)
    n_ctx, deep_rows = _context(source, options), options.deep_rows
    with opened(files, options.hardware, watch, n_ctx=n_ctx, deep_rows=deep_rows) as loaded:
        yield loaded, files


def _context(source: Source, options: BenchOptions) -> int:
    """Return the context length that the longest prompt and its answer need. Raises PopError."""
    n_needed, trained = max(options.n_prompts) + N_DECODE, trained_ctx(source.first)
    if options.n_ctx is not None and options.n_ctx < n_needed:
        raise PopError(
            f"the longest prompt needs {n_needed} tokens, but the context has only {options.n_ctx}",
            "use a larger context or shorter prompts",
            cause="bench-context",
        )
    if trained is not None and trained < n_needed:
        message = f"the longest prompt needs {n_needed} tokens, but the limit is {trained}"
        raise PopError(message, "use shorter prompts", cause="bench-trained")
    return options.n_ctx or n_needed


def _backend(model: PopModel, hardware: Hardware) -> tuple[str, str]:
    """Describe the device and the CPU kernels. On a GPU, the second string is "" instead."""
    all_devices = devices()
    gpus = [device for device in all_devices if device.is_gpu]
    device = gpus[0] if gpus and hardware.n_gpu_layers != 0 else all_devices[-1]
    n_threads = model.engine.context.n_threads
    threads = f"{n_threads} thread{'s' * (n_threads > 1)}"
    kernels = "" if device.is_gpu else cpu_kernels()
    return f"{device.name} ({device.description}), {threads}", kernels
