"""The result of reading a prompt."""

from collections.abc import Callable
from dataclasses import dataclass

from pop_converter.base.errors import StoppedError
from pop_local.engine.llama.backend import Counters

# Called with (done, total) uncached rows after each batch.
OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True)
class Read:
    """Result of reading a prompt.

    `n_cached`: reused rows, of which `n_stale` are stale. `counters`: the backend's counters for
    this prompt. `encode_s`: time of image encoding in seconds. `n_exact`: leading rows that equal
    the full model's after the read. `is_short`: whether the prompt was too short to be pruned.
    """

    n_prompt: int
    n_cached: int
    counters: Counters
    encode_s: float = 0.0
    n_exact: int = 0
    n_stale: int = 0
    is_short: bool = False


class PrefillStoppedError(StoppedError):
    """A read was stopped. `read`: the result up to then."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read
