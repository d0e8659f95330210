"""Models that see, for the tests of pictures."""

import pytest

from support.seeing import ARCHS, Seeing, make_seeing


@pytest.fixture(scope="module", params=ARCHS)
def seeing(request, tmp_path_factory) -> Seeing:
    return Seeing(request.param, make_seeing(tmp_path_factory.mktemp("seeing"), request.param))


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Seeing:
    return Seeing("llama", make_seeing(tmp_path_factory.mktemp("smol"), "llama"))
