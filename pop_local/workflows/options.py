"""What the workflows are told: how deep, which rows in full, on what hardware."""

from dataclasses import dataclass
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.format import Budget, PopMeta
from pop_converter.popfile.plan import TAIL_TOKENS, Plan, make_plan, parse_skip


@dataclass(frozen=True)
class Skip:
    """A share of the layers ("1/3", "0.33"), or a number of them ("10")."""

    share: str

    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        """Plan it for a model; `rows` go to make_plan. Raises PlanError."""
        return make_plan(shape, skip=parse_skip(self.share), **rows)


@dataclass(frozen=True)
class Boundary:
    """The first layer that context tokens skip."""

    layer: int

    def plan(self, shape: ModelShape, **rows: Any) -> Plan:
        """Plan it for a model; `rows` go to make_plan. Raises PlanError."""
        return make_plan(shape, boundary=self.layer, **rows)


@dataclass(frozen=True)
class Within:
    """The deepest boundary whose measured quality is within the budget, or `at`, if that is."""

    budget: Budget
    at: Skip | Boundary | None = None


@dataclass(frozen=True)
class Fastest:
    """The fastest boundary and selection with which facts of a prompt are still found again."""


Depth = Within | Fastest | Skip | Boundary


@dataclass(frozen=True)
class RowOptions:
    """Which tokens of a prompt run in full, and from which length on prompts are pruned.

    `min_prompt` None: a length by the model, below which little would be saved. `select`: the share
    of context tokens that run all layers because the question needs them.
    """

    sink_tokens: int = PopMeta.sink_tokens
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int | None = None
    select: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """What to compute on.

    `n_threads` None: the physical cores. `n_gpu_layers`: -1 for all, of no effect without a GPU.
    `rpc`: servers on other machines (HOST:PORT), which count as GPUs.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
    rpc: tuple[str, ...] = ()
