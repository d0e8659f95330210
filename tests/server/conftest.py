"""The server in this process, on a small random model."""

import pytest

from pop_local.engine.llama.backend import Mode
from pop_local.server.app import create_app
from support.asked import N_CTX, NAME
from support.calls import opened
from support.converted import tiny
from support.filling import make_filler
from support.serving import asking
from support.synthetic import TEMPLATE


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("api"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def client(path):
    model = opened(path, n_ctx=N_CTX)
    with asking(create_app(model, NAME, max_body_bytes=100_000)) as client:
        yield client
    model.close()


@pytest.fixture(scope="module")
def full(path):
    """Another copy, which runs in full."""
    model = opened(path, n_ctx=N_CTX)
    model.set_mode(Mode.OFF)
    return model


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    """A model that can fill in between two texts, and its client."""
    model = opened(make_filler(tmp_path_factory.mktemp("fim")), n_ctx=N_CTX)
    with asking(create_app(model, NAME)) as client:
        yield model, client
    model.close()
