"""A server to download from."""

from collections.abc import Iterator

import pytest

from pop_local.fetching import download as download_module
from support.downloads import MODEL
from support.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(download_module, "_PAUSE_S", 0.0)
    with serving(Hub(plain={"tiny.gguf": MODEL})) as hub:
        yield hub
