"""Models for unit tests: vision, plain and chat models."""

from pathlib import Path

import pytest

from pop_local import PopModel
from pop_local.engine.sessions.session_file import Sessions
from support.calls import first_of
from support.converted import tiny
from support.programs import opened
from support.synthetic import TEMPLATE, make_gguf
from support.vision_models import ARCHS, VisionModel, make_vision_model


@pytest.fixture(scope="module", params=ARCHS)
def vision_model(request, tmp_path_factory) -> VisionModel:
    return VisionModel(
        request.param, make_vision_model(tmp_path_factory.mktemp("vision"), request.param)
    )


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> VisionModel:
    return VisionModel("llama", make_vision_model(tmp_path_factory.mktemp("smol"), "llama"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("model") / "llama.gguf", "llama")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("talking"), boundary=5, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def opened_chat_model(chat_model) -> PopModel:
    return opened(chat_model)


@pytest.fixture
def model(opened_chat_model) -> PopModel:
    """Return the shared chat model, reset; many files override this fixture."""
    opened_chat_model.pruning = True
    first_of(opened_chat_model).cache.clear()
    return opened_chat_model


@pytest.fixture
def sessions(tmp_path) -> Sessions:
    return Sessions(tmp_path / "sessions")
