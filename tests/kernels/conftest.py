"""Kernels are tested where the processor has them; a library without our patches fails."""

import numpy as np
import pytest

from support import ggml


@pytest.fixture(scope="session")
def kernels() -> str:
    """Their name; what asks for it is skipped where there are none."""
    name = ggml.kernels()
    if name in ("none", "off"):
        pytest.skip(f"the library's kernels on this processor: {name}")
    return name


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
