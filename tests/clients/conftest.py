"""A server of a tiny model that calls tools."""

from collections.abc import Iterator

import pytest

from support.chat_tools import QWEN, TEMPLATES
from support.converted import tiny
from support.serving import Served, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tiny(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATES[QWEN].read_text())
    with served(path, "--name", "tiny", "--ctx", 8192) as server:
        yield server
