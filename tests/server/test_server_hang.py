"""A model that does not come back: the server says so, and ends all the same."""

import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from support.paths import ROOT, TESTS

# Whatever is asked, the model sleeps in C.
CODE = """
import ctypes, logging, socket, sys
from pathlib import Path
from pop_local.server import app, worker
from support.calls import opened

worker.Worker._answer = lambda self, job: ctypes.CDLL(None).sleep(600)
worker._HUNG_S = 0.1
app._AT_LAST_S = 0.5
logging.basicConfig()
listening = socket.create_server(("127.0.0.1", 0))
made = app.create_app(opened(Path(sys.argv[1])), "tiny")
print(listening.getsockname()[1], flush=True)
app.run_app(made, listening)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_hung_model_is_reported_and_a_signal_ends_the_server(path):
    server = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path += {[str(ROOT), str(TESTS)]}{CODE}", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    root = f"http://127.0.0.1:{int(server.stdout.readline())}"
    body = {"prompt": "a"}
    asked = threading.Thread(target=lambda: _lost(f"{root}/v1/completions", body), daemon=True)
    asked.start()
    until_s = time.monotonic() + 30
    while (health := httpx2.get(f"{root}/health")).status_code == 200:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert health.status_code == 503
    assert "the model has not come back" in health.json()["error"]["message"]
    server.send_signal(signal.SIGTERM)
    _, log = server.communicate(timeout=30)
    assert server.returncode == 128 + signal.SIGTERM
    assert "ended without it" in log
    asked.join()


def _lost(url: str, body: dict[str, str]) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.post(url, json=body, timeout=60)
