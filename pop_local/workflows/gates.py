"""Virtual gates: whether they can be had here, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import Source
from pop_local.base.errors import PopError, UnsupportedArchitectureError
from pop_local.workflows.conversion.refusals import TooLittleMemoryError
from pop_local.workflows.events import Watch
from pop_local.workflows.options import AnalyzeOptions, Hardware
from pop_local.workflows.torch_device import computing, torch_device

if TYPE_CHECKING:
    from pop_local.measure.importance import Importance

Windows = Sequence[Sequence[int]]
# More at a time are not faster on a CPU.
_MAX_BATCH = 4


@dataclass(frozen=True)
class Gates:
    """Where torch computes, and how many windows at a time."""

    device: str
    n_batch: int


def possible(
    source: Source, options: AnalyzeOptions, hardware: Hardware, watch: Watch
) -> Gates | None:
    """How to compute the gates; None, with a warning, where they cannot be had.

    Raises PopError for too little memory.
    """
    from pop_local.research.hyper import read_hyper

    try:
        device = torch_device(hardware, "the gates are left out")
    except PopError as error:
        watch.on_warning(error)
        return None
    try:
        hyper = read_hyper(source)
    except UnsupportedArchitectureError as error:
        watch.on_warning(PopError(f"the gates are left out: {error.message}", error.hint))
        return None
    from pop_local.research.gates import needed_bytes

    for n_batch in range(min(_MAX_BATCH, options.n_gated), 0, -1):
        needed = needed_bytes(
            source_shape(source), hyper, options.n_window, options.n_answer, n_batch
        )
        if needed <= device.free_bytes:
            return Gates(device.name, n_batch)
    raise TooLittleMemoryError(
        "the gates need",
        needed,
        device.free_bytes,
        "take shorter windows, close other programs, or leave them out",
        cause="no-memory-for-gates",
    )


def importance(
    source: Source,
    gates: Gates,
    windows: Windows,
    options: AnalyzeOptions,
    watch: Watch,
) -> Importance:
    """The importance of each layer for reading and for answering. Raises PopError, StoppedError."""
    from pop_local.measure.importance import measure_importance
    from pop_local.research.decoder import Decoder

    with computing(
        "the gates", "take shorter windows, or leave them out", cause="no-memory-for-gates"
    ):
        return measure_importance(
            Decoder(source, gates.device),
            windows,
            options.n_context,
            n_batch=gates.n_batch,
            seed=options.seed,
            on_progress=watch.stage("Virtual gates"),
        )
