"""Kinds of K/V projections for context tokens in skipped layers."""

from enum import Enum


class Projection(str, Enum):
    """A kind of projection: the value of `pop.projection`, in files and on the command line.

    OWN: the layers' own projections, without new tensors. FITTED: least squares from the state at
    the boundary. WIDE: least squares from more inputs (pop_converter.fit.wide).
    """

    OWN = "own"
    FITTED = "fitted"
    WIDE = "fitted-wide"

    def __str__(self) -> str:
        return self.value


# Part of the name of every tensor that a conversion adds.
TENSOR_MARK = ".pop_"
