"""How to fit: one set of options for the library, the commands and the kept state."""

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from pop_converter.fit.least_squares import RIDGE, KvType
from pop_converter.projection import Projection


@dataclass(frozen=True)
class FitOptions:
    """How to fit the K/V projections of skipped layers.

    `projection`: a kind of fit (pop_converter.popfile.format), None for the better one, measured.
    `tokens`: how many to read, None for a number by the model. `texts`: files and folders, none for
    Python's documentation and code, and samples of the model. `memory_bytes`: for the sums of a
    pass over the text, None for half of what is free. `state_path`: where a stopped fit is kept,
    None for nowhere. `mmproj`: with it the fit is on pictures, too: those in the folder `images`,
    or drawn ones. `distill_tokens`: of text for a fit that is distilled, too, None for as many as
    are read, 64k at least.
    """

    tokens: int | None = None
    texts: tuple[Path, ...] = ()
    kv_type: KvType = KvType.Q8_0
    ridge: float = RIDGE
    memory_bytes: int | None = None
    state_path: Path | None = None
    mmproj: Path | None = None
    images: Path | None = None
    projection: Projection | None = None
    distill_tokens: int | None = None

    @property
    def text_name(self) -> str:
        """The text, and the pictures if there are any, for people."""
        from pop_local.calibration.texts import DEFAULT_NAME

        shown = f"; pictures ({self.images or 'drawn'})" if self.mmproj else ""
        return f"{', '.join(map(str, self.texts)) or DEFAULT_NAME}{shown}"

    def n_tokens(self, n_embd: int) -> int:
        """Return how many tokens are read, in whole windows.

        Raises CalibrationError for too few.
        """
        from pop_local.calibration.texts import N_WINDOW, default_tokens, n_windows

        if self.tokens is None:
            return default_tokens(n_embd)
        return n_windows(self.tokens, n_embd) * N_WINDOW

    def n_distilled(self, n_embd: int) -> int:
        """Return how many windows of text a fit is trained on at most. Raises CalibrationError."""
        from pop_local.calibration.texts import N_DISTILLED, N_WINDOW

        n_tokens, least = self.n_tokens(n_embd), N_DISTILLED
        if self.distill_tokens is not None:
            n_tokens, least = self.distill_tokens, 1
        return max(n_tokens // N_WINDOW, least)

    def require_text(self, n_embd: int) -> None:
        """Refuse what a fit would refuse, before anything is measured. Raises PopError."""
        from pop_local.calibration.texts import require_text

        self.n_tokens(n_embd)
        if self.texts:
            require_text(self.texts, n_embd)
        if self.mmproj is not None:
            from pop_local.calibration.images import pictures_of
            from pop_local.engine.images.mmproj import fingerprint

            fingerprint(self.mmproj)
            pictures_of(self.images)

    def at(self, boundary: int) -> "FitOptions":
        """Return the options with a state file of their own, for one of several fits."""
        if self.state_path is None:
            return self
        path = self.state_path
        kind = f"-{self.projection}" if self.projection else ""
        return replace(self, state_path=path.with_name(f"{path.name}-{boundary}{kind}"))

    def kept(self) -> list[Path]:
        """Return the state files that are there, of whatever boundaries (`at`)."""
        if self.state_path is None:
            return []
        name = glob.escape(self.state_path.name)
        folder = self.state_path.parent
        return sorted([*folder.glob(name), *folder.glob(f"{name}-[0-9]*")])
