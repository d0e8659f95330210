"""Options of an analysis."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of an analysis; `text`: the text file to measure on (default: the shipped prose).

    Each window has `n_context` + `n_answer` tokens. `n_probed`: the number of windows for the
    probes. `n_gated`: the number of windows for the gates (0: no gates). `with_fit`: whether to
    measure fitted projections. `fit_tokens`: the number of tokens for fitting (default: a quarter
    of a conversion's number).
    """

    text: Path | None = None
    n_context: int = 192
    n_answer: int = 64
    n_probed: int = 3
    n_gated: int = 20
    with_fit: bool = True
    fit_tokens: int | None = None
    seed: int = 0

    @property
    def n_window(self) -> int:
        return self.n_context + self.n_answer
