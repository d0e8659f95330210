"""A sequence's settings for prompt rows: mode, boundary, and whether to store boundary states."""

from dataclasses import dataclass

from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.slot import Slot


@dataclass(frozen=True)
class SequenceSettings:
    """Settings for a sequence's prompt rows. Cached rows may depend on them."""

    mode: Mode
    boundary: int  # the first layer that context rows skip, or 0 if prompts cannot be pruned
    exact: int  # the first layer that context rows skip without loss (0: no layer)
    keeps_states: bool = False  # whether boundary states are stored, so that rows can be refilled

    @classmethod
    def of(cls, slot: Slot) -> "SequenceSettings":
        boundary = backend.get_boundary(slot.context.ctx)
        exact = backend.model_exact(slot.context.model)
        return cls(slot.mode, boundary, exact=0 if 0 < boundary < exact else exact)

    @property
    def can_switch(self) -> bool:
        """True if prompts can be pruned, or if they can skip layers without loss."""
        return bool(self.boundary or self.exact)

    @property
    def is_pruning(self) -> bool:
        """True if context rows stop at the boundary and their K/V in later layers are projected."""
        return self.mode is Mode.CONTEXT and not self.exact
