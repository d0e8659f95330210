"""Settings for a slot's prompt rows: mode, boundary, and whether to store boundary states."""

from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.slot import Slot


class PruningSettings:
    """Settings for a slot's prompt rows. Changing a setting may invalidate the cached rows.

    `exact`: the first layer that context rows skip without loss, or 0 if no such layer exists.
    `keeps_states`: whether boundary states are stored. To change a setting, use CachedSequence.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.keeps_states = False
        self.mode = slot.mode
        self.exact = self._exact_layer()

    @property
    def boundary(self) -> int:
        return backend.get_boundary(self._slot.context.ctx)

    @property
    def can_switch(self) -> bool:
        """True if prompts can be pruned, or if they can skip layers without loss."""
        return bool(self.boundary or self.exact)

    @property
    def is_pruning(self) -> bool:
        """True if context rows stop at the boundary and their K/V in later layers are projected."""
        return self.mode is Mode.CONTEXT and not self.exact

    def set_mode(self, mode: Mode) -> None:
        self._slot.set_mode(mode)
        self.mode = self._slot.mode

    def set_boundary(self, layer: int) -> None:
        """Set the first layer to prune (see backend.set_boundary)."""
        backend.set_boundary(self._slot.context.ctx, layer)
        self.exact = self._exact_layer()
        self.mode = self._slot.mode

    def keep_states(self, keep: bool) -> None:
        """Start storing new rows' boundary states, or drop all states if `keep` is False."""
        backend.call("llama_pop_set_snapshots", self._slot.context.ctx, keep)
        self.keeps_states = keep

    def _exact_layer(self) -> int:
        """Return the first layer that can be skipped without loss.

        Returns 0 if every layer is needed or if pruning starts before the first skippable layer.
        """
        exact = backend.model_exact(self._slot.context.model)
        return 0 if 0 < self.boundary < exact else exact
