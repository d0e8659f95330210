"""Who trains fits end to end: research, handed in by whoever asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pop_converter.fit.least_squares import KvType
    from pop_converter.gguf.source import Source
    from pop_converter.popfile.plan import Plan
    from pop_converter.popfile.rewrite import Fitted
    from pop_local.calibration.options import FitOptions
    from pop_local.calibration.texts import Windows
    from pop_local.workflows.events import Watch
    from pop_local.workflows.options import Hardware


class Trainer(Protocol):
    """What a conversion asks of a trainer; `device` and `reference` are the trainer's own.

    A reference has the boundary `first` from which on it serves, and the `windows` that were read.
    All raise PopError, and the last two StoppedError.
    """

    def require_distillable(
        self,
        plan: Plan,
        source: Source,
        options: FitOptions,
        hardware: Hardware,
        read: Any = None,
    ) -> Any:
        """Return the device on which the plan's fit can be trained, with what was `read`."""

    def prepare(
        self, source: Source, first: int, windows: Windows, device: Any, watch: Watch
    ) -> Any:
        """Read windows in full; return the reference for boundaries from `first` on."""

    def distilled(
        self,
        plan: Plan,
        source: Source,
        fitted: Fitted,
        kv_type: KvType,
        reference: Any,
        device: Any,
        watch: Watch,
    ) -> Fitted:
        """Train a fit end to end."""
