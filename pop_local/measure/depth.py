"""How deep pruning may go: each boundary of the deeper half, measured cheaply.

A few windows of prose give the KL and the copy ratio, random tokens repeated give the retention
(see `probes`), all with the layers' own projections: no file is written. Fitted projections change
the KL of prose, hardly where the cliff of copying lies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pop_converter.errors import PlanError
from pop_converter.shape import ModelShape

from pop_local.engine.model import PopModel

from .heldout import TextTokens
from .limit import speedup_limit
from .quality import Quality, QualitySettings, measure_depths

# A layer carries the cliff if skipping it, too, loses this part of the full model's gain.
CLIFF = 0.2


@dataclass(frozen=True)
class Depth:
    """One boundary.

    `lost_retention`: what skipping the layer at the boundary loses on top of those above it, as a
    part of the full model's gain; None where the full model has none.
    """

    n_skipped: int
    speedup_limit: float
    quality: Quality
    lost_retention: float | None

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
    text_tokens: TextTokens,
    settings: QualitySettings,
    n_prompt: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Depth, ...]:
    """One for each of `boundaries`; the speed-up limits are for prompts of `n_prompt` tokens.

    Fitted projections take this place once several boundaries are calibrated in one pass: the same
    figures from one fitted file for each boundary (`measure_quality`).
    """
    qualities = measure_depths(model, text_tokens, settings, boundaries(shape), on_progress)
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
