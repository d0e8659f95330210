"""Symmetric positive systems in float64: with torch, or with numpy."""

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# Smaller systems are solved by numpy in less time than it takes to import torch.
TORCH_FROM = 1024


class SingularError(Exception):
    """A pivot is so small that rounding decides the solution."""


def solve(system: Doubles, rest: Doubles, least_pivot: float) -> Doubles:
    """Solve `system` [n, n], of unit diagonal, for `rest` [n, m]. Raises SingularError."""
    with_torch = len(system) >= TORCH_FROM and importlib.util.find_spec("torch") is not None
    return (solve_torch if with_torch else solve_numpy)(system, rest, least_pivot)


def solve_numpy(system: Doubles, rest: Doubles, least_pivot: float) -> Doubles:
    """Solve with numpy; see `solve`."""
    try:
        least_root = float(np.linalg.cholesky(system).diagonal().min())
    except np.linalg.LinAlgError as error:
        raise SingularError from error
    _check(least_root, least_pivot)
    # numpy has no triangular solve.
    return np.asarray(np.linalg.solve(system, rest), np.float64)


def solve_torch(system: Doubles, rest: Doubles, least_pivot: float) -> Doubles:
    """Solve with torch, on the CPU; see `solve`."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(system))
    if int(failed):
        raise SingularError
    _check(float(factor.diagonal().min()), least_pivot)
    solution: Any = torch.cholesky_solve(torch.from_numpy(rest), factor)
    return np.asarray(solution.numpy(), np.float64)


def _check(least_root: float, least_pivot: float) -> None:
    if least_root**2 < least_pivot:
        raise SingularError
