"""Choose the kind of fit, and divide a calibration into passes that fit in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import psutil

from pop_base.errors import PopError
from pop_base.numbers import size
from pop_converter.fit import least_squares as fit
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import N_WINDOW

# If the sums of all boundaries exceed this size, a search fits only a few boundaries.
MOST_SUMS_BYTES = 6 * 10**9
_ANY = 1 << 60
# Number of rows per dimension of the state for choosing a wide input.
_ROWS_PER_DIM = 2
_LEAST_WINDOWS = 4
# Maximum share of a plain fit's speed that a wide fit may cost
# (docs/notebook/wide-fits.md).
MAX_WIDE_COST = 0.015


class FitPair(NamedTuple):
    """A boundary, and a skipped layer whose projections are fitted to the boundary's state."""

    boundary: int
    layer: int


@dataclass(frozen=True)
class FitNeeds:
    """The passes of a calibration.

    `groups`: the (boundary, layer) pairs to fit in each pass over the text. `sums_bytes`: memory
    for the largest group's Gram matrices, including scratch memory.
    """

    groups: tuple[tuple[FitPair, ...], ...]
    sums_bytes: int


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


def fit_needs(plans: Sequence[Plan], options: FitOptions) -> FitNeeds:
    """Return the passes of fits of the same kind. Raises CalibrationError for too few tokens."""
    options.n_tokens(plans[0].shape.n_embd)
    kind = fit_kind(plans[0], options)
    return plan_needs([replace(plan, projection=kind) for plan in plans], options)


def thin_out(plans: Sequence[Plan], options: FitOptions) -> tuple[Plan, ...]:
    """Return the first plan and as many evenly spaced later plans as one pass can handle.

    The sums may use up to MOST_SUMS_BYTES or the options' `memory_bytes`, whichever is larger.
    """
    most = max(MOST_SUMS_BYTES, options.memory_bytes or 0)
    options = replace(options, memory_bytes=_ANY)
    for step in range(1, len(plans)):
        few = plans[::step]
        fitted = [plan for plan in few if plan.fitted_layers]
        if not fitted or fit_needs(fitted, options).sums_bytes <= most:
            return tuple(few)
    return tuple(plans[:1])


def plan_needs(plans: Sequence[Plan], options: FitOptions) -> FitNeeds:
    """Divide the (boundary, layer) pairs of all plans into passes whose sums fit in memory.

    The memory limit is the options' `memory_bytes` (default: half of the free memory). A pair whose
    sums exceed the limit gets a separate pass.
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
    return FitNeeds(tuple(map(tuple, groups)), max(sizes) + scratch)


def n_choosing(n_embd: int) -> int:
    return max(_LEAST_WINDOWS, -(-_ROWS_PER_DIM * n_embd // N_WINDOW))
