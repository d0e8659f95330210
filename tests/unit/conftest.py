"""Models that see, for the tests of pictures, and one to talk to, for sessions and programs."""

from pathlib import Path

import pytest

from pop_local.engine.sessions.session_file import Sessions
from support.converted import tiny
from support.seeing import ARCHS, Seeing, make_seeing
from support.synthetic import TEMPLATE


@pytest.fixture(scope="module", params=ARCHS)
def seeing(request, tmp_path_factory) -> Seeing:
    return Seeing(request.param, make_seeing(tmp_path_factory.mktemp("seeing"), request.param))


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Seeing:
    return Seeing("llama", make_seeing(tmp_path_factory.mktemp("smol"), "llama"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("talking"), boundary=5, chat_template=TEMPLATE)


@pytest.fixture
def sessions(tmp_path) -> Sessions:
    return Sessions(tmp_path / "sessions")
