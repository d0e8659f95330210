"""Skip tests on processors without kernels; fail with an unpatched library."""

import numpy as np
import pytest

from support import ggml


@pytest.fixture(scope="session")
def kernels() -> str:
    """Return the name of the active kernels; skip the test if no kernels are active."""
    name = ggml.kernels()
    if name in ("none", "off"):
        pytest.skip(f"the library's kernels on this processor: {name}")
    return name


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
