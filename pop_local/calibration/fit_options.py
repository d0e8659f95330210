"""Options of a fit, which the library, the commands and stored fits share."""

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from pop_converter.fit.least_squares import RIDGE, KvType
from pop_converter.projection import Projection


@dataclass(frozen=True)
class FitOptions:
    """Options for fitting the K/V projections of skipped layers.

    `projection`: the kind of fit (None: a wide fit if its cost is small). `tokens`: the number of
    tokens to read (None: depends on the model's size). `texts`: the files and folders to read
    (empty: Python's documentation and code, and samples of the model). `memory_bytes`: the memory
    for the sums of one pass (None: half of the free memory). `state_path`: the file in which a
    stopped fit is stored (None: a stopped fit is lost).
    """

    tokens: int | None = None
    texts: tuple[Path, ...] = ()
    kv_type: KvType = KvType.Q8_0
    ridge: float = RIDGE
    memory_bytes: int | None = None
    state_path: Path | None = None
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

    def at(self, boundary: int) -> "FitOptions":
        """Return options whose state file is named after the boundary and the projection."""
        if self.state_path is None:
            return self
        path = self.state_path
        kind = f"-{self.projection}" if self.projection else ""
        return replace(self, state_path=path.with_name(f"{path.name}-{boundary}{kind}"))

    def state_files(self) -> list[Path]:
        """Return the existing state files of all boundaries (see `at`)."""
        if self.state_path is None:
            return []
        name = glob.escape(self.state_path.name)
        folder = self.state_path.parent
        return sorted([*folder.glob(name), *folder.glob(f"{name}-[0-9]*")])
