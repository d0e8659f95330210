"""How deep pruning may go: each boundary of the deeper half, measured cheaply.

A few windows of prose give the KL and the copy ratio, random tokens repeated give the retention
(see `probes`): with the layers' own projections at each boundary, then with fitted ones where those
leave hope. A fit divides the KL of prose; it makes the cliff of copying less steep at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pop_converter.errors import PlanError
from pop_converter.format import Budget
from pop_converter.shape import ModelShape

from pop_local.engine.model import PopModel

from .budget import (
    BALANCED,
    FAST,
    NEAR_LOSSLESS,
    deepest_inside,
    is_inside,
    is_promising,
)
from .limit import speedup_limit
from .quality import Quality
from .reference import Reference, measure_against

# A layer carries the cliff if skipping it, too, loses this part of the full model's gain.
CLIFF = 0.2


@dataclass(frozen=True)
class Depth:
    """One boundary.

    `quality`: with the layers' own projections; `fitted`: with a fit, None where none was made.
    `lost_retention`: what skipping the layer at the boundary loses on top of those above it, as a
    part of the full model's gain; None where the full model has none. With own projections.
    """

    n_skipped: int
    speedup_limit: float
    quality: Quality
    lost_retention: float | None
    fitted: Quality | None = None

    @property
    def boundary(self) -> int:
        return self.quality.boundary

    @property
    def is_cliff(self) -> bool:
        return self.lost_retention is not None and self.lost_retention >= CLIFF


def boundaries(shape: ModelShape) -> tuple[int, ...]:
    """From the last layer alone down to half of all. Raises PlanError for a model of one layer."""
    if shape.n_layer < 2:
        raise PlanError("a model of one layer has none that could be skipped")
    return tuple(range(shape.n_layer - 1, max(1, shape.n_layer // 2) - 1, -1))


def measure_cliff(
    model: PopModel,
    shape: ModelShape,
    reference: Reference,
    n_prompt: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Depth, ...]:
    """One for each of `boundaries`; the speed-up limits are for prompts of `n_prompt` tokens."""
    qualities = measure_against(reference, model, boundaries(shape), on_progress)
    n_full = model.rule.sink_tokens + model.rule.tail_tokens
    return tuple(
        Depth(
            n_skipped=shape.n_layer - quality.boundary,
            speedup_limit=speedup_limit(shape, n_prompt, quality.boundary, n_full),
            quality=quality,
            lost_retention=lost,
        )
        for quality, lost in zip(qualities, _losses(qualities), strict=True)
    )


def worth_fitting(depths: Sequence[Depth]) -> tuple[int, ...]:
    """Boundaries that a fit may bring into the loosest budget, and the one past them.

    The likeliest to be chosen first; not those that are near-lossless without it.
    """
    hopeful = [is_promising(FAST, depth.quality, fitted=True) for depth in depths]
    n_worth = hopeful.index(False) + 1 if False in hopeful else len(depths)
    wanted = [
        depth.boundary
        for depth in depths[:n_worth]
        if depth.n_skipped > 1 and not is_inside(NEAR_LOSSLESS, depth.quality)
    ]
    guess = deepest_inside(
        {d.boundary: is_promising(BALANCED, d.quality, fitted=True) for d in depths}
    )
    return tuple(sorted(wanted, key=lambda boundary: abs(boundary - (guess or boundary))))


def with_fits(depths: Sequence[Depth], fitted: Mapping[int, Quality]) -> tuple[Depth, ...]:
    """`fitted` by boundary."""
    return tuple(replace(depth, fitted=fitted.get(depth.boundary)) for depth in depths)


def deepest_within(budget: Budget, depths: Sequence[Depth]) -> Depth | None:
    """By the figures with a fit, where none was made by those of the own projections."""
    verdicts = {d.boundary: is_inside(budget, d.fitted or d.quality) for d in depths}
    deepest = deepest_inside(verdicts)
    return next((depth for depth in depths if depth.boundary == deepest), None)


def _losses(qualities: Sequence[Quality]) -> list[float | None]:
    """Of boundaries one below the other; what is worse than not copying at all counts as that."""
    losses: list[float | None] = []
    before = 1.0
    for quality in qualities:
        if quality.induction_retention is None:
            losses.append(None)
            continue
        now = max(0.0, quality.induction_retention.value)
        losses.append(before - now)
        before = now
    return losses
