"""What a calibration takes: how often the text is read, and how much memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pop_converter import fit
from pop_converter.plan import Plan
from pop_converter.shape import ModelShape
from pop_converter.source import Source

from pop_local.calibration.texts import N_WINDOW

# Python with numpy and llama.cpp, before any model.
_BASE_BYTES = 300 * 10**6


class Pair(NamedTuple):
    """A layer's projections from the state at a boundary: what is fitted at once."""

    boundary: int
    layer: int


@dataclass(frozen=True)
class Needs:
    """What a calibration takes. `groups`: the pairs of each pass over the text.

    `sums_bytes`: the Gram matrices of the largest group and the work on them; `total_bytes`: the
    whole process, weights twice since the backend may repack them.
    """

    groups: tuple[tuple[Pair, ...], ...]
    sums_bytes: int
    total_bytes: int


def plan_needs(plans: Sequence[Plan], source: Source, memory_bytes: int) -> Needs:
    """Group the pairs of all plans so that their sums stay below `memory_bytes`, one at least."""
    shape = plans[0].shape
    pairs = [Pair(plan.boundary, layer) for plan in plans for layer in plan.fitted_layers]
    scratch = max(fit.scratch_bytes(shape.n_embd, n_kv(shape, p.layer), N_WINDOW) for p in pairs)
    groups: list[list[Pair]] = [[]]
    sizes = [0]
    for pair in pairs:
        size = fit.gram_bytes(shape.n_embd, n_kv(shape, pair.layer))
        if groups[-1] and sizes[-1] + size + scratch > memory_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(pair)
        sizes[-1] += size
    n_sums = max(sizes) + scratch
    n_stored = 4 * sum(shape.kv_macs[pair.layer] for pair in pairs)
    n_heads = max(dim // 64 for dim in shape.attn_dim)
    n_states = 4 * N_WINDOW * (shape.n_embd + 1) * len(plans)
    buffers = 4 * N_WINDOW * (shape.n_vocab + 8 * shape.n_embd + 2 * n_heads * N_WINDOW)
    total = n_sums + n_stored + n_states + 2 * source.size_bytes + buffers + _BASE_BYTES
    return Needs(tuple(map(tuple, groups)), n_sums, total)


def n_kv(shape: ModelShape, layer: int) -> int:
    """How many numbers K and V of a layer are, for one token."""
    return shape.kv_macs[layer] // shape.n_embd
