"""Goals of a conversion: a named boundary, or a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.format import Budget
from pop_converter.popfile.pruning_plan import Plan, boundary_of, make_plan, parse_skip
from pop_local.measure.budget import boundaries

# No measured model copies with fewer than a third of its layers (docs/quality.md).
LEAST_DIVISOR = 3


class Goal(ABC):
    """A rule that chooses the layers to skip in a conversion."""

    @property
    def limits(self) -> Budget | None:
        """Return the budget that the quality must meet, if any."""
        return None

    @property
    def is_named(self) -> bool:
        return True

    @abstractmethod
    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        """Return the plans that may be chosen, the shallowest first. Raises PopError.

        `rows`: keyword arguments of make_plan.
        """


class Named(Goal):
    """A boundary that the caller names."""

    @abstractmethod
    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        """Return the boundary's plan for a model; `rows` as in `plans`. Raises PlanError."""

    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        return (self.plan(shape, **rows),)


@dataclass(frozen=True)
class Skip(Named):
    """A share of the layers ("1/3", "0.33"), or their number ("10")."""

    share: str

    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        return make_plan(shape, boundary=boundary_of(shape, parse_skip(self.share)), **rows)


@dataclass(frozen=True)
class Boundary(Named):
    """The first layer that context tokens skip."""

    layer: int

    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        return make_plan(shape, boundary=self.layer, **rows)


@dataclass(frozen=True)
class Within(Goal):
    """The fastest candidate whose measured quality is within the budget, or `at` if it is."""

    budget: Budget
    at: Named | None = None

    @property
    def limits(self) -> Budget:
        return self.budget

    @property
    def is_named(self) -> bool:
        return self.at is not None

    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        if self.at is not None:
            return self.at.plans(shape, **rows)
        tried = boundaries(shape, LEAST_DIVISOR)
        return tuple(make_plan(shape, boundary=each, **rows) for each in tried)
