"""Options of a fit, for the library, the commands and the stored state."""

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from pop_converter.fit.least_squares import RIDGE, KvType
from pop_converter.projection import Projection


@dataclass(frozen=True)
class FitOptions:
    """Options for fitting the K/V projections of skipped layers.

    `projection`: kind of fit (None: wide if it is cheap). `tokens`: number of tokens to read (None:
    by the model's size). `texts`: files and folders (none: Python's documentation and code, and
    samples of the model). `memory_bytes`: memory for the sums of one pass (None: half of the free
    memory). `state_path`: file for a stopped fit (None: not stored). `distill_tokens`: number of
    tokens for distilling (None: the fit's, 64k or more).
    """

    tokens: int | None = None
    texts: tuple[Path, ...] = ()
    kv_type: KvType = KvType.Q8_0
    ridge: float = RIDGE
    memory_bytes: int | None = None
    state_path: Path | None = None
    projection: Projection | None = None
    distill_tokens: int | None = None

    @property
    def text_name(self) -> str:
        from pop_local.calibration.texts import DEFAULT_NAME

        return ", ".join(map(str, self.texts)) or DEFAULT_NAME

    def n_tokens(self, n_embd: int) -> int:
        """Return the number of tokens to read, in whole windows. Raises CalibrationError."""
        from pop_local.calibration.texts import N_WINDOW, default_tokens, n_windows

        if self.tokens is None:
            return default_tokens(n_embd)
        return n_windows(self.tokens, n_embd) * N_WINDOW

    def n_distilled(self, n_embd: int) -> int:
        """Return the maximum number of windows to distil on. Raises CalibrationError."""
        from pop_local.calibration.texts import N_DISTILLED, N_WINDOW

        n_tokens, least = self.n_tokens(n_embd), N_DISTILLED
        if self.distill_tokens is not None:
            n_tokens, least = self.distill_tokens, 1
        return max(n_tokens // N_WINDOW, least)

    def require_text(self, n_embd: int) -> None:
        """Raise PopError before any measurement if a fit would refuse the text."""
        from pop_local.calibration.texts import require_text

        self.n_tokens(n_embd)
        if self.texts:
            require_text(self.texts, n_embd)

    def at(self, boundary: int) -> "FitOptions":
        """Return a copy whose state file is named after the boundary and the projection."""
        if self.state_path is None:
            return self
        path = self.state_path
        kind = f"-{self.projection}" if self.projection else ""
        return replace(self, state_path=path.with_name(f"{path.name}-{boundary}{kind}"))

    def state_files(self) -> list[Path]:
        """Return the existing state files of all boundaries (`at`)."""
        if self.state_path is None:
            return []
        name = glob.escape(self.state_path.name)
        folder = self.state_path.parent
        return sorted([*folder.glob(name), *folder.glob(f"{name}-[0-9]*")])
