"""A local server with files to download."""

from collections.abc import Iterator

import pytest

from pop_local.models import resumable_download
from support.downloads import MODEL
from support.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(resumable_download, "_PAUSE_S", 0.0)
    with serving(Hub(plain={"tiny.gguf": MODEL})) as hub:
        yield hub
