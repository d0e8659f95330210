"""Limits that keep the server responsive: hung models, idle connections, memory."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx2
import pytest

from support.calls import wait_for
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits")

SERVER = """
import logging, socket
from pathlib import Path
from support.calls import opened
from support.serving import app_of
logging.basicConfig()
listening = socket.create_server(("127.0.0.1", 0))
made = app_of(opened(Path(sys.argv[1])), "tiny")
print(listening.getsockname()[1], flush=True)
app.run_app(made, listening)
"""
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"


@contextmanager
def running(path, changed: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a server in a separate process after the code `changed`, and yield its port."""
    begun = f"import sys; sys.path += {[str(ROOT), str(TESTS)]}\nfrom pop_local.server import app\n"
    server = subprocess.Popen(
        [sys.executable, "-c", begun + changed + SERVER, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server, int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


def test_hung_model_is_reported_and_killed_by_signal(path):
    changed = """
import ctypes
from pop_local.server import worker
worker.Worker._answer = lambda self, *_: ctypes.CDLL(None).sleep(600)
worker._HUNG_S = 0.1
app._KILL_S = 0.5
"""

    def ask() -> None:
        with pytest.raises(httpx2.TransportError):
            httpx2.post(f"{root}/v1/completions", json={"prompt": "a"}, timeout=60)

    with running(path, changed) as (server, port):
        root = f"http://127.0.0.1:{port}"
        request = threading.Thread(target=ask, daemon=True)
        request.start()
        wait_for(lambda: httpx2.get(f"{root}/health").status_code == 503)
        health = httpx2.get(f"{root}/health")
        assert "the model has not responded" in health.json()["error"]["message"]
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
        assert server.returncode == 128 + signal.SIGTERM
        assert "killing the process" in log
        request.join()


def test_idle_connections_do_not_exhaust_descriptors(path):
    changed = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    with running(path, changed) as (server, port), ExitStack() as idle:
        for _ in range(100):
            idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        assert httpx2.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30)[1] == ""


@pytest.mark.parametrize(
    "half",
    [b"", b"GET /hea", HALF],
)
def test_incomplete_request_times_out(silent, half):
    with socket.create_connection(("127.0.0.1", silent), timeout=30) as connection:
        connection.sendall(half)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_disconnect_stops_tokenization(path):
    changed = """
from pop_local.engine.llama import interrupt
from pop_local.server.task_factory import TaskFactory
make, wanted = TaskFactory.completions, interrupt.Interrupt._stop_requested
def seen(self, body):
    try:
        return make(self, body)
    except BaseException as error:
        print(type(error).__name__, flush=True)
def asked(self):
    print("asked", flush=True)
    time.sleep(0.05)
    return wanted(self)
import time
interrupt.Interrupt._stop_requested, TaskFactory.completions = asked, seen
"""
    body = json.dumps({"prompt": "\U00012345" * 80_000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with running(path, changed) as (server, port):
        assert server.stdout is not None
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
            assert server.stdout.readline() == "asked\n"
            assert httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        lines = list(iter(server.stdout.readline, "StoppedError\n"))
        assert len(lines) < 20  # of about 60


def test_hang_during_finalization_is_killed(path):
    changed = """
import atexit, signal, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command line sets it
def hang():
    if signal.getitimer(signal.ITIMER_REAL)[0]:  # advance the alarm that the server has set
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(600)
atexit.register(hang)
"""
    with running(path, changed) as (server, port):
        assert httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
        assert server.returncode == -signal.SIGALRM


def test_incomplete_request_does_not_block_shutdown(path):
    with running(path, "app._FAREWELL_S = 0.2\n") as (server, port):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(HALF)
            assert httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
            server.send_signal(signal.SIGTERM)
            assert connection.recv(100).startswith(b"HTTP/1.1 503")
        _, log = server.communicate(timeout=30)
        assert "Traceback" not in log


def test_oversized_body_returns_413(path):
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 120000000"
    with running(path, "") as (_, port):
        for route in ("/page/file?name=a.txt", "/v1/completions"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(f"{head.format(route)}\r\n\r\n".encode())
                for _ in range(120):
                    connection.sendall(b"x" * 1_000_000)
                assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_signal_stops_reading_of_files(path, tmp_path):
    (tmp_path / "slow_reader.py").write_text("""
import time
class SlowReader:
    def text(self, path):
        open(path + ".started", "w").close()
        time.sleep(600)
""")
    changed = f"""
import signal, tempfile
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command line sets it
sys.path.append({str(tmp_path)!r})
import slow_reader
from pop_local.server.page import page_routes
from pop_local.engine.limited.process import KeptProcess
tempfile.tempdir = {str(tmp_path)!r}
page_routes.reader = KeptProcess(
    slow_reader.SlowReader, limit_s=60.0, limit_bytes=2**30
)
"""
    with running(path, changed) as (server, port), ThreadPoolExecutor() as threads:
        url = f"http://127.0.0.1:{port}/page/file"
        uploads = [threads.submit(httpx2.post, url, content=b"x", timeout=60) for _ in range(2)]
        wait_for(lambda: any(tmp_path.rglob("*.started")))
        server.send_signal(signal.SIGTERM)
        assert [upload.result().status_code for upload in uploads] == [503, 503]
        server.communicate(timeout=30)
        assert server.returncode == 143
    assert {file.name for file in tmp_path.iterdir()} <= {"slow_reader.py", "__pycache__"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_evicted_states_return_memory_to_system(path):
    """Cache states of 2 to 16 MB, copied like a context's, with small allocations between."""
    changed = """
import random, resource
import numpy as np
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import SavedState
from pop_local.engine.chat_messages import Chunk, TurnStats
from pop_local.server import worker

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def work(self, job, *_):
    rng, cache, small, most, before = random.Random(0), PromptCache(1 << 26), {}, 0, resident()
    for number in range(100):
        size = rng.randrange(1 << 21, 1 << 24)
        buffer = bytearray(size)
        tokens = np.array([number], np.int32)
        cache.add("", SavedState(None, "", tokens, None, None, bytes(buffer)))
        small[rng.randrange(40)] = bytes(rng.randrange(1 << 10, 1 << 16))
        del buffer
        most = max(most, resident() - before - cache.size_bytes)
    yield Chunk(str(most >> 20), TurnStats(1, 0, 0, 1, 0.0, 0.0, 0, 0.0, "stop"))

worker.Worker._answer = work
"""
    with running(path, changed) as (_, port):
        url = f"http://127.0.0.1:{port}/v1/completions"
        reply = httpx2.post(url, json={"prompt": "a"}, timeout=60)
        # With glibc's default threshold it is the cache's size, 64 MiB and more.
        assert int(reply.json()["choices"][0]["text"]) < 24


@pytest.fixture(scope="module")
def silent(path):
    """The port of a server with a short request timeout."""
    changed = "from pop_local.server import connections; connections.REQUEST_S = 0.2\n"
    with running(path, changed) as (_, port):
        yield port
