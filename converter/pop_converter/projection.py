"""The kinds of K/V projections for context tokens in skipped layers."""

from enum import Enum


class Projection(str, Enum):
    """A kind of projection, used in the key `pop.projection` and on the command line.

    OWN uses the layers' own projections and adds no tensors. FITTED is a least-squares fit on the
    boundary state. WIDE is a least-squares fit on additional inputs (fit/wide.py).
    """

    OWN = "own"
    FITTED = "fitted"
    WIDE = "fitted-wide"

    def __str__(self) -> str:
        return self.value


# Part of the name of every tensor that a conversion adds.
TENSOR_MARK = ".pop_"
