"""Who trains fits end to end: research, which the command hands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pop_converter.gguf.source import Source
from pop_converter.popfile.plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_local.calibration.options import FitOptions
from pop_local.workflows.events import Watch
from pop_local.workflows.options import Hardware

if TYPE_CHECKING:
    from pop_local.calibration.texts import CalibrationText


class Distilling(Protocol):
    """Trains fits of one model end to end; `MakeDistiller` makes one."""

    def require(self, plan: Plan) -> object:
        """Raise PopError where the plan's fit cannot be distilled."""

    def train(self, plan: Plan, fitted: Fitted, text: CalibrationText, n_deeper: int) -> Fitted:
        """Return the fit, trained on `text`. Raises PopError, StoppedError.

        With `n_deeper`, as many boundaries below will probably follow.
        """


MakeDistiller = Callable[[Source, FitOptions, Hardware, Watch], Distilling]
