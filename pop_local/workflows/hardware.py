"""The processors that workflows compute on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Processors to compute on.

    `n_threads` None: the physical cores. `n_gpu_layers`: -1 for all, of no effect without a GPU.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
