"""Options of several workflows: which rows run in full, on what hardware."""

from dataclasses import dataclass

from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.plan import TAIL_TOKENS


@dataclass(frozen=True)
class RowOptions:
    """The tokens of a prompt that run in full, and the shortest prompt in tokens that is pruned.

    `min_prompt` None: the length below which pruning would save little.
    """

    sink_tokens: int = PopMeta.sink_tokens
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int | None = None


@dataclass(frozen=True)
class Hardware:
    """Processors to compute on.

    `n_threads` None: the physical cores. `n_gpu_layers`: -1 for all, of no effect without a GPU.
    `rpc`: servers on other machines (HOST:PORT), which count as GPUs.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
    rpc: tuple[str, ...] = ()
