"""What the workflows are told: how deep, which rows in full, on what hardware."""

from dataclasses import dataclass

from converter.format import Budget, PopMeta
from converter.plan import TAIL_TOKENS


@dataclass(frozen=True)
class Within:
    """The deepest boundary whose measured quality is within the budget."""

    budget: Budget


@dataclass(frozen=True)
class Skip:
    """A share of the layers ("1/3", "0.33"), or a number of them ("10")."""

    share: str


@dataclass(frozen=True)
class Boundary:
    """The first layer that context tokens skip."""

    layer: int


Depth = Within | Skip | Boundary


@dataclass(frozen=True)
class RowOptions:
    """Which tokens of a prompt run in full, and from which length on prompts are pruned.

    `min_prompt` None: a length by the model, below which little would be saved.
    """

    sink_tokens: int = PopMeta.sink_tokens
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int | None = None


@dataclass(frozen=True)
class Hardware:
    """What to compute on.

    `n_threads` None: the physical cores. `n_gpu_layers`: -1 for all, of no effect without a GPU.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
