"""The model that a command was given, opened; for a dialogue also others in its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pop_local.ui.watch import terminal_watch
from pop_local.workflows.open import open_model
from pop_local.workflows.options import Hardware

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


@dataclass(frozen=True)
class Opener:
    """Opens a model as the options say; called with a name, that one, whose sidecar and mmproj lie
    beside it."""

    model: str | None
    sidecar: Path | None
    n_ctx: int | None
    hardware: Hardware
    in_full: bool = False
    parse_special: bool = False
    select: float | None = None
    refill: str = "off"
    mmproj: Path | None = None
    image_tokens: int | None = None

    def __call__(self, name: str | None = None, n_ctx: int | None = None) -> PopModel:
        with terminal_watch() as watch:
            opened = open_model(
                name or self.model,
                None if name else self.sidecar,
                n_ctx=n_ctx or self.n_ctx,
                hardware=self.hardware,
                watch=watch,
                in_full=self.in_full,
                select=self.select,
                keep_states=self.refill != "off",
                mmproj=None if name else self.mmproj,
                image_tokens=self.image_tokens,
            )
        if self.mmproj and not name:
            opened.prompter.open_eye()  # what does not fit is said now, not with the first picture
        opened.refiller.refill_answers(None if self.refill == "answer" else 0)
        opened.prompter.parse_special = self.parse_special
        return opened
