"""Fixtures: servers of small random models in this process."""

import pytest

from pop_local.engine.llama.backend import Mode
from pop_local.server import api
from support.calls import opened
from support.converted import tiny
from support.filling import make_filler
from support.library import NAMES, Library
from support.server_requests import N_CTX, NAME, complete, text_of
from support.serving import app_client, app_of
from support.synthetic import TEMPLATE, make_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("api"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def client(path):
    model = opened(path, n_ctx=N_CTX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_MIN_BODY_BYTES", 100_000)
        app = app_of(model, NAME)
    with app_client(app) as client:
        yield client
    model.close()


@pytest.fixture(scope="module")
def full(path):
    """A copy of the model that reads in full."""
    model = opened(path, n_ctx=N_CTX)
    model.engine.set_mode(Mode.OFF)
    return model


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    """A model that can infill, and its client."""
    model = opened(make_filler(tmp_path_factory.mktemp("fim")), n_ctx=N_CTX)
    with app_client(app_of(model, NAME)) as client:
        yield model, client
    model.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        make_gguf(here / f"{name}.gguf", "llama", seed=seed, chat_template=TEMPLATE)
    return here


@pytest.fixture(scope="module")
def expected(folder):
    """Each model's completion when it is served alone."""
    texts = {}
    for name in NAMES:
        model = opened(folder / f"{name}.gguf", n_ctx=N_CTX)
        with app_client(app_of(model, name)) as client:
            texts[name] = text_of(complete(client))
        model.close()
    assert len(set(texts.values())) == len(NAMES)
    return texts


@pytest.fixture
def library(folder):
    return Library(folder)
