"""Options of several workflows: which rows run in full, on what hardware, what is analyzed."""

from dataclasses import dataclass
from pathlib import Path

from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.plan import TAIL_TOKENS

N_GATED = 20


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


@dataclass(frozen=True)
class AnalyzeOptions:
    """What is analyzed. `text`: a file, None for the shipped prose.

    Windows have `n_context` + `n_answer` tokens: `n_probed` of them for the probes, `n_gated` for
    the gates, 0 for no gates. `with_fit`: measure fitted projections; `fit_tokens` None for a
    quarter of what a conversion fits on.
    """

    text: Path | None = None
    n_context: int = 192
    n_answer: int = 64
    n_probed: int = 3
    n_gated: int = N_GATED
    with_fit: bool = True
    fit_tokens: int | None = None
    seed: int = 0

    @property
    def n_window(self) -> int:
        return self.n_context + self.n_answer
