"""Options of several workflows: which rows run in full, on what hardware."""

from dataclasses import dataclass

from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.plan import TAIL_TOKENS


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
    """Processors to compute on.

    `n_threads` None: the physical cores. `n_gpu_layers`: -1 for all, of no effect without a GPU.
    `rpc`: servers on other machines (HOST:PORT), which count as GPUs.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
    rpc: tuple[str, ...] = ()
