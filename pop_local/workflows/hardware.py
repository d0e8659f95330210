"""Processors for a workflow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Processors for a workflow.

    `n_threads` None: one thread per physical core. `n_gpu_layers`: layers on the GPU, -1 for all.
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
