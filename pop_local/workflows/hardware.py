"""The CPU and GPU settings for a workflow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """The CPU and GPU settings for a workflow.

    `n_threads` is the number of CPU threads (None: one per physical core). `n_gpu_layers` is the
    number of layers on the GPU (-1: all layers).
    """

    n_threads: int | None = None
    n_gpu_layers: int = -1
