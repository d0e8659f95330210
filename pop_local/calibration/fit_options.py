"""Fit options shared by the library and the commands."""

from dataclasses import dataclass
from pathlib import Path

from pop_converter.fit.least_squares import RIDGE, KvType
from pop_converter.projection import Projection
from pop_local.calibration.texts import (
    DEFAULT_NAME,
    N_WINDOW,
    CalibrationError,
    default_tokens,
    least_tokens,
    require_text,
)

# Distillation on fewer windows can overfit, as it did for SmolLM2 on 32 windows. More windows help,
# but take longer.
N_DISTILLED = 128


@dataclass(frozen=True)
class FitOptions:
    """Options for fitting the K/V projections of skipped layers.

    `projection`: kind of fit (None: wide if it costs little speed, otherwise plain). `tokens`:
    number of tokens to fit on (None: depends on the model's size). `texts`: files to fit on (empty:
    default text). `memory_bytes`: limit for one pass's sums (None: half of free
    memory).
    """

    tokens: int | None = None
    texts: tuple[Path, ...] = ()
    kv_type: KvType = KvType.Q8_0
    ridge: float = RIDGE
    memory_bytes: int | None = None
    projection: Projection | None = None

    @property
    def text_name(self) -> str:
        return ", ".join(map(str, self.texts)) or DEFAULT_NAME

    def n_tokens(self, n_embd: int) -> int:
        """Return how many tokens a fit uses: a multiple of N_WINDOW. Raises CalibrationError."""
        default, least = default_tokens(n_embd), least_tokens(n_embd)
        n_tokens = default if self.tokens is None else self.tokens
        if n_tokens < least:
            raise CalibrationError(
                f"{n_tokens:,} tokens are too few for a fit: this model needs {least:,}",
                f"use {least} tokens or more (default: {default})",
                cause="too-few-tokens",
                n_least=least,
                n_default=default,
            )
        return -(-n_tokens // N_WINDOW) * N_WINDOW

    def n_distilled(self, n_embd: int) -> int:
        """Return the maximum number of windows to distill on. Raises CalibrationError."""
        return max(self.n_tokens(n_embd) // N_WINDOW, N_DISTILLED)

    def require_text(self, n_embd: int) -> None:
        """Raise PopError if the text is too short for a fit."""
        self.n_tokens(n_embd)
        if self.texts:
            require_text(self.texts, n_embd)
