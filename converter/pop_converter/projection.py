"""Kinds of K/V projections that context tokens get in skipped layers."""

from enum import Enum


class Projection(str, Enum):
    """A kind of projection: the value of `pop.projection`, in files and on the command line.

    OWN: the layers' own, no tensors. FITTED: least squares from the state at the boundary. WIDE:
    from more inputs than that (pop_converter.fit.wide). ATTENTION: from the boundary layer's
    attention heads as well.
    """

    OWN = "own"
    FITTED = "fitted"
    WIDE = "fitted-wide"
    ATTENTION = "fitted-attention"

    @property
    def is_wide(self) -> bool:
        """Whether it has more inputs than the state."""
        return self in (Projection.WIDE, Projection.ATTENTION)

    def __str__(self) -> str:
        return self.value


# In the names of tensors that a conversion adds, and of no others.
TENSOR_MARK = ".pop_"
