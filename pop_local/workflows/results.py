"""What a conversion gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError
from converter.format import Measured, PopMeta
from converter.plan import Plan
from converter.rewrite import Fitted, Sizes

if TYPE_CHECKING:
    from pop_local.measure.quality import Quality


@dataclass(frozen=True)
class Trial:
    """One boundary as a search measured it."""

    plan: Plan
    quality: Quality
    in_budget: bool


@dataclass(frozen=True)
class Chosen:
    """What is to be written: a plan, its fit (None for own projections), and its quality.

    `trials`: what a search measured, from the shallowest on; none where the caller named the depth.
    """

    plan: Plan
    fitted: Fitted | None
    measured: Measured | None
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Converted:
    """A written conversion. `meta` is what the file says of itself, its measured quality included.

    `warnings`: what was let through and might have been refused.
    """

    path: Path
    plan: Plan
    meta: PopMeta
    sizes: Sizes
    trials: tuple[Trial, ...]
    warnings: tuple[PopError, ...]
