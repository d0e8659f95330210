"""The goal of a conversion: a named boundary or a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.format import Budget
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_local.measure.budget import boundaries

# No measured model can copy from its prompt with fewer than a third of its layers
# (docs/quality.md).
LEAST_DIVISOR = 3


@dataclass(frozen=True)
class Boundary:
    """The first layer that context tokens skip."""

    layer: int


@dataclass(frozen=True)
class Within:
    """The goal of meeting a budget at boundary `at` (None: at the fastest possible boundary)."""

    budget: Budget
    at: Boundary | None = None


Goal = Boundary | Within


def plans_of(goal: Goal, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
    """Return a goal's plans, sorted by the number of skipped layers.

    `rows`: keyword arguments for make_plan. Raises PlanError.
    """
    named = goal.at if isinstance(goal, Within) else goal
    if named is not None:
        return (make_plan(shape, boundary=named.layer, **rows),)
    tried = boundaries(shape, LEAST_DIVISOR)
    return tuple(make_plan(shape, boundary=each, **rows) for each in tried)
