"""Options for a fit, shared by the library and the commands."""

from dataclasses import dataclass
from pathlib import Path

from pop_converter.fit.least_squares import RIDGE, KvType
from pop_converter.projection import Projection


@dataclass(frozen=True)
class FitOptions:
    """Options for fitting the K/V projections of skipped layers.

    `projection`: the kind of fit (None: a wide fit if its cost is small). `tokens`: the number of
    tokens to fit on (None: depends on the model's size). `texts`: the files and folders to fit on
    (empty: Python's documentation and code, and samples of the model). `memory_bytes`: the memory
    for the sums of one pass (None: half of the free memory).
    """

    tokens: int | None = None
    texts: tuple[Path, ...] = ()
    kv_type: KvType = KvType.Q8_0
    ridge: float = RIDGE
    memory_bytes: int | None = None
    projection: Projection | None = None

    @property
    def text_name(self) -> str:
        from pop_local.calibration.texts import DEFAULT_NAME

        return ", ".join(map(str, self.texts)) or DEFAULT_NAME

    def n_tokens(self, n_embd: int) -> int:
        """Return the number of tokens to read, as whole windows. Raises CalibrationError."""
        from pop_local.calibration.texts import N_WINDOW, default_tokens, n_windows

        if self.tokens is None:
            return default_tokens(n_embd)
        return n_windows(self.tokens, n_embd) * N_WINDOW

    def n_distilled(self, n_embd: int) -> int:
        """Return the maximum number of windows for distilling. Raises CalibrationError."""
        from pop_local.calibration.texts import N_DISTILLED, N_WINDOW

        return max(self.n_tokens(n_embd) // N_WINDOW, N_DISTILLED)

    def require_text(self, n_embd: int) -> None:
        """Raise PopError, before any measurement, for a text on which a fit would fail."""
        from pop_local.calibration.texts import require_text

        self.n_tokens(n_embd)
        if self.texts:
            require_text(self.texts, n_embd)
