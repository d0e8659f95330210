"""Goals of a conversion: a named boundary, a budget, or all the speed that facts allow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.format import Budget
from pop_converter.popfile.plan import Plan, make_plan, parse_skip
from pop_local.base.errors import PopError
from pop_local.measure.budget import boundaries
from pop_local.workflows.conversion.plan import ConversionRun, Goal, Outcome

# No model was seen to copy with fewer than a third of its layers left.
LEAST_DIVISOR = 3


class Named(Goal):
    """A boundary that the caller names."""

    @abstractmethod
    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        """Plan it for a model; `rows` go to make_plan. Raises PlanError."""

    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        return (self.plan(shape, **rows),)

    def carry_out(self, run: ConversionRun) -> Outcome:
        if run.conversion.deepest.select:
            from pop_local.workflows.conversion.fastest import write_first

            return write_first(run, takes_any=run.force)
        from pop_local.workflows.conversion.named import write_named

        return write_named(run)


@dataclass(frozen=True)
class Skip(Named):
    """A share of the layers ("1/3", "0.33"), or a number of them ("10")."""

    share: str

    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        return make_plan(shape, skip=parse_skip(self.share), **rows)


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
        if rows.get("select"):
            raise PopError(
                "a budget allows no selection", "name the boundary alone, or select nothing"
            )
        if self.at is not None:
            return self.at.plans(shape, **rows)
        tried = boundaries(shape, LEAST_DIVISOR)
        return tuple(make_plan(shape, boundary=each, **rows) for each in tried)

    def carry_out(self, run: ConversionRun) -> Outcome:
        from pop_local.workflows.conversion.within import write_deepest

        return write_deepest(run, self.budget)


@dataclass(frozen=True)
class Fastest(Goal):
    """The fastest boundary and selection with which facts of a prompt are still found again."""

    @property
    def is_named(self) -> bool:
        return False

    def plans(self, shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
        from pop_local.workflows.conversion.fastest import recipes

        return recipes(shape, **rows)

    def carry_out(self, run: ConversionRun) -> Outcome:
        from pop_local.workflows.conversion.fastest import write_first

        return write_first(run, takes_any=False)
