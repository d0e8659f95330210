"""Goals of a conversion: a named boundary, or a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.format import Budget
from pop_converter.popfile.pruning_plan import Plan, boundary_of, make_plan, parse_skip
from pop_local.measure.budget import boundaries

# No model was seen to copy with fewer than a third of its layers left.
LEAST_DIVISOR = 3


class Goal(ABC):
    """How many layers a conversion skips."""

    @property
    def limits(self) -> Budget | None:
        """The budget that the quality is held to; None for none."""
        return None

    @property
    def is_named(self) -> bool:
        return True

    @abstractmethod
    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        """Return the plans that may be chosen, in the order of the choice.

        `rows` go to make_plan. Raises PlanError, PopError.
        """


class Named(Goal):
    """A boundary that the caller names."""

    @abstractmethod
    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        """Plan it for a model; `rows` go to make_plan. Raises PlanError."""

    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        return (self.plan(shape, **rows),)


@dataclass(frozen=True)
class Skip(Named):
    """A share of the layers ("1/3", "0.33"), or a number of them ("10")."""

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
    """The deepest boundary whose measured quality is within the budget, or `at`, if that is."""

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
