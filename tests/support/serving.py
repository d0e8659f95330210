"""Servers for tests: `pop-local serve` in a child process, or its application in this process."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from starlette.applications import Starlette
from starlette.testclient import TestClient

from pop_local.engine.model import PopModel
from pop_local.server.access import AccessRules
from pop_local.server.app import create_app
from pop_local.server.model_listing import ModelFile
from pop_local.server.model_pool import ModelPool

PATIENCE_S = 60
LOCAL = AccessRules()


@dataclass(frozen=True)
class Served:
    """A running server; `root` is its address without /v1."""

    process: subprocess.Popen[bytes]
    root: str
    log_file: Path

    @property
    def api(self) -> str:
        return f"{self.root}/v1"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def post(self, path: str, timeout: float | httpx2.Timeout = PATIENCE_S, **body: object):
        return httpx2.post(f"{self.api}/{path}", json=body, timeout=timeout)

    def metrics(self) -> dict[str, float]:
        lines = httpx2.get(f"{self.root}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextmanager
def served(model: Path | str, *arguments: object, changed: str = "") -> Iterator[Served]:
    """Run a server, after the code `changed` in its process."""
    program = f"{changed}\nfrom pop_local.__main__ import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--port", 0, "--threads", 1]
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [str(word) for word in (*command, *arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield Served(process, _address(process, log_file), log_file)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log_file: Path) -> str:
    while process.poll() is None:
        if match := re.search(r"APIs at (http://\S+)/v1", log_file.read_text()):
            return match[1]
        time.sleep(0.05)
    raise AssertionError(log_file.read_text())


def app_of(model: PopModel, name: str, *, rules=LOCAL, **how) -> Starlette:
    """Return the application of one model; `how`: options of ModelRegistry."""
    models = ModelPool.of_one(ModelFile(name, model.engine.context.files.path), model, **how)
    return create_app(models, rules)


def app_client(app: Starlette) -> TestClient:
    """Return a client of an application; its workers run while the client is open."""
    return TestClient(app, base_url="http://localhost:8080")


def metric_values(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {k: float(v) for k, v in (x.split(" ") for x in lines if not x.startswith("#"))}
