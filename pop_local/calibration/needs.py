"""Estimate a calibration's memory use and number of passes over the text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import psutil

from pop_base.errors import PopError
from pop_base.numbers import size
from pop_converter.architecture.shape import ModelShape
from pop_converter.fit import least_squares as fit
from pop_converter.gguf.source import Source
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import stored_bytes
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.samples import MAX_SEQUENCES
from pop_local.calibration.texts import N_WINDOW, n_sampled_of
from pop_local.engine.llama.devices import has_kernels

# Memory of Python with numpy and llama.cpp, before a model is opened.
_BASE_BYTES = 100 * 10**6
# If the sums of all boundaries exceed this size, a search fits only a few boundaries.
MOST_SUMS_BYTES = 6 * 10**9
_ANY = 1 << 60
# Number of rows per dimension of the state for choosing a wide input.
_ROWS_PER_DIM = 2
_LEAST_WINDOWS = 4
# Size of the weights after llama.cpp repacks them for AMX, relative to their size in the file
# (measured on an 8B model in Q8_0).
_REPACKED = 1.05
# Number of stored rows of the full model's predictions. A row takes two bytes for each token of the
# vocabulary, and eight more bytes while its window is being compared.
_N_PREDICTED = 16 * 128
_N_COMPARED = 128
# Maximum share of a plain fit's speed that a wide fit may cost
# (docs/notebook/wide-fits.md).
MAX_WIDE_COST = 0.015


class FitPair(NamedTuple):
    """A boundary, and a skipped layer whose projections are fitted to the boundary's state."""

    boundary: int
    layer: int


@dataclass(frozen=True)
class FitNeeds:
    """The cost of a calibration.

    `groups`: the (boundary, layer) pairs to fit in each pass over the text. `n_inputs`: the largest
    fit's input count. `n_sampled`: the number of text windows to sample from the model first.
    `sums_bytes`: memory for the largest group's Gram matrices, including scratch memory.
    `total_bytes`: the process's peak memory, excluding the mapped model file.
    """

    groups: tuple[tuple[FitPair, ...], ...]
    sums_bytes: int
    total_bytes: int
    n_inputs: int
    n_sampled: int


def free_bytes() -> int:
    return int(psutil.virtual_memory().available)


def require_memory(work: str, needed_bytes: int, hint: str, *, cause: str) -> None:
    """Raise PopError if not enough memory is free. `work`: the operation that needs the memory."""
    free = free_bytes()
    if needed_bytes > free:
        message = f"{work} needs {size(needed_bytes)} of memory, but only {size(free)} is free"
        raise PopError(message, hint, cause=cause)


def fit_cost(plan: Plan, projection: Projection) -> float:
    """Return the fraction by which `projection` reduces a plain fit's speedup limit."""
    plain, wide = (
        replace(plan, projection=kind).speedup_limit for kind in (Projection.FITTED, projection)
    )
    return 1 - wide / plain


def fit_kind(plan: Plan, options: FitOptions) -> Projection:
    """Return the kind of fit in `options` (None: wide if it costs little speed, or else plain)."""
    if options.projection is not None:
        return options.projection
    is_cheap = fit_cost(plan, Projection.WIDE) <= MAX_WIDE_COST
    return Projection.WIDE if is_cheap else Projection.FITTED


def fit_needs(plans: Sequence[Plan], source: Source, options: FitOptions) -> FitNeeds:
    """Return the cost of all fits. Raises CalibrationError if `options.tokens` is too low."""
    kind = fit_kind(plans[0], options)
    plans = [replace(plan, projection=kind) for plan in plans]
    n_windows = options.n_tokens(plans[0].shape.n_embd) // N_WINDOW
    n_sampled = 0 if options.texts else n_sampled_of(n_windows)
    return plan_needs(plans, source, options, n_sampled)


def thin_out(plans: Sequence[Plan], source: Source, options: FitOptions) -> tuple[Plan, ...]:
    """Return the first plan and as many evenly spaced later plans as one pass can handle.

    The sums may use up to MOST_SUMS_BYTES or the options' `memory_bytes`, whichever is larger.
    """
    most = max(MOST_SUMS_BYTES, options.memory_bytes or 0)
    options = replace(options, memory_bytes=_ANY)
    for step in range(1, len(plans)):
        few = plans[::step]
        fitted = [plan for plan in few if plan.fitted_layers]
        if not fitted or fit_needs(fitted, source, options).sums_bytes <= most:
            return tuple(few)
    return tuple(plans[:1])


def plan_needs(
    plans: Sequence[Plan], source: Source, options: FitOptions, n_sampled: int = 0
) -> FitNeeds:
    """Divide the (boundary, layer) pairs of all plans into passes whose sums fit in memory.

    The memory limit is the options' `memory_bytes` (default: half of the free memory). A pair whose
    sums exceed the limit gets a separate pass. `n_sampled`: the number of windows to sample first.
    """
    shape, memory_bytes = plans[0].shape, options.memory_bytes
    if memory_bytes is None:
        memory_bytes = free_bytes() // 2
    skipped = (FitPair(plan.boundary, layer) for plan in plans for layer in plan.fitted_layers)
    pairs = list(dict.fromkeys(skipped))
    n_inputs = shape.n_embd + max(shape.n_wide(plan.boundary, plan.projection) for plan in plans)
    scratch = max(fit.scratch_bytes(n_inputs, shape.n_kv(p.layer), N_WINDOW) for p in pairs)
    gram = 4 * (n_inputs + 1) ** 2
    groups: list[list[FitPair]] = [[]]
    sizes = [0]
    for pair in pairs:
        cross = 4 * (n_inputs + 1) * shape.n_kv(pair.layer)
        has_gram = any(other.boundary == pair.boundary for other in groups[-1])
        n_bytes = cross if has_gram else gram + cross
        if groups[-1] and sizes[-1] + n_bytes + scratch > memory_bytes:
            groups.append([])
            sizes.append(0)
            n_bytes = gram + cross
        groups[-1].append(pair)
        sizes[-1] += n_bytes
    n_sums = max(sizes) + scratch
    n_stored = sum(stored_bytes(plan, options.kv_type) for plan in plans)
    boundaries = {pair.boundary for pair in max(groups, key=len)}
    n_tapped = len(boundaries) * n_inputs + sum(shape.n_k + shape.n_v)
    # Three copies of the activations exist: in the graph, in the tap, and as inputs of the sums.
    reading = 3 * 4 * N_WINDOW * n_tapped + _context_bytes(shape, N_WINDOW, N_WINDOW)
    n_at_once = min(n_sampled, MAX_SEQUENCES)
    sampling = _context_bytes(shape, n_at_once * N_WINDOW, n_at_once)
    is_wide = any(plan.projection != Projection.FITTED for plan in plans)
    choosing = is_wide * _choosing_bytes(shape, len(boundaries))
    fitting = reading + max(n_sums, choosing)
    # While a fit is measured, the full model's predictions stay in memory.
    predicted = (2 * _N_PREDICTED + 8 * _N_COMPARED) * shape.n_vocab
    measuring = _context_bytes(shape, 2 * N_WINDOW, N_WINDOW) + predicted
    repacked = 0 if has_kernels() else int(_REPACKED * source.size_bytes)
    total = _BASE_BYTES + n_stored + repacked + max(fitting, sampling, measuring)
    return FitNeeds(tuple(map(tuple, groups)), n_sums, total, n_inputs, n_sampled)


def _context_bytes(shape: ModelShape, n_cells: int, n_rows: int) -> int:
    """Return the memory (in bytes) for an F16 KV cache and a batch of `n_rows` rows with logits."""
    cache = 2 * n_cells * sum(shape.n_k + shape.n_v)
    return cache + 4 * n_rows * (2 * shape.n_vocab + 8 * shape.n_embd)


def n_choosing(n_embd: int) -> int:
    return max(_LEAST_WINDOWS, -(-_ROWS_PER_DIM * n_embd // N_WINDOW))


def _choosing_bytes(shape: ModelShape, n_boundaries: int) -> int:
    """Return how many bytes of memory are needed to choose a wide fit's extra inputs."""
    n, n_rows = shape.n_embd, n_choosing(shape.n_embd) * N_WINDOW
    axes = 8 * n * (2 * n_rows + 3 * n)
    neurons = 4 * max(shape.n_neurons) * (3 * n + 5 * N_WINDOW)
    return 4 * n * n_rows * n_boundaries + 8 * n * (n_rows + n) + max(axes, neurons)
