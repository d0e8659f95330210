"""Models on two local RPC servers, compared with the CPU backend."""

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import psutil
import pytest
from gguf import GGMLQuantizationType as Type

from pop_converter.base.errors import PopError
from pop_local.commands.rpc_server import is_loopback
from pop_local.engine.cache.cache_keys import FULL
from pop_local.engine.llama import backend, rpc
from pop_local.engine.llama.backend import Counters
from support.calls import append, evaluated, greedy, kv_bytes, last_logits, opened, prompt
from support.converted import tiny
from support.program import called, run
from support.rpc import Server, free_port, rpc_server


@pytest.fixture(scope="module")
def pop_file(tmp_path_factory):
    """Use F32, because RPC servers do not repack weights, and repacking changes rounding."""
    template = "{{ messages[-1]['content'] }}"
    return tiny(tmp_path_factory.mktemp("rpc"), type=Type.F32, chat_template=template)


@pytest.fixture(scope="module")
def servers():
    with ExitStack() as stack:
        yield [stack.enter_context(rpc_server()).name for _ in range(2)]


@pytest.fixture
def pair(pop_file, servers):
    """Open a model on the CPU and on the servers."""
    with ExitStack() as stack:

        def both(**options):
            # Off by default with servers, whose devices may lack it.
            options = {"flash_attn": False} | options
            models = opened(pop_file, **options), opened(pop_file, rpc=servers, **options)
            for model in models:
                stack.enter_context(model)
            return models

        yield both


def assert_same(model, other):
    np.testing.assert_array_equal(last_logits(model), last_logits(other))
    assert kv_bytes(model) == kv_bytes(other)
    assert backend.get_counters(model.engine.context.ctx) == backend.get_counters(
        other.engine.context.ctx
    )


def test_a_pruned_prompt_equals_the_local_cpus(pair, servers, caplog):
    caplog.set_level(logging.INFO, "pop_local.llama_cpp")
    here, there = pair()
    for name in servers:
        assert f"[{name}] model buffer size" in caplog.text
    for model in (here, there):
        assert evaluated(model, prompt(300)) == Counters(283, 17)
    assert_same(here, there)
    assert greedy(there, prompt(300)) == greedy(here, prompt(300))


def test_refilled_rows_equal_the_local_cpus(pair, monkeypatch):
    models = pair(keep_states=True)
    for model in models:
        # Chunks as large as a batch, regardless of time.
        monkeypatch.setattr(model.engine.refiller, "_adapt", lambda n_rows, took_s: None)
        monkeypatch.setattr(model.engine.refiller, "_chunk", 64)
        append(model, prompt(200))
        assert model.engine.refiller.refill() == 200
        assert model.engine.states.key == FULL
    assert_same(*models)


def test_a_local_state_is_restored_on_servers(pair):
    here, there = pair()
    append(here, prompt(200))
    there.engine.states.restore(here.engine.states.save())
    assert greedy(there, prompt(220)) == greedy(here, prompt(220))


def test_two_models_of_a_process_share_a_server(pop_file, servers):
    with opened(pop_file, rpc=servers) as one, opened(pop_file, rpc=servers[:1]) as other:
        assert greedy(one, prompt(50)) == greedy(other, prompt(50))


def test_a_server_that_has_another_client_is_named(pop_file, servers, monkeypatch):
    monkeypatch.setattr(rpc, "_TIMEOUT_S", 0.2)
    with socket.create_connection(rpc.address(servers[1])) as client:
        client.sendall(rpc._HELLO)
        client.recv(1)
        with pytest.raises(PopError, match=f"{servers[1]} does not answer") as caught:
            opened(pop_file, rpc=servers)
    assert "one client at a time" in caught.value.hint


IMPATIENT = "from pop_local.engine.llama import rpc; rpc._HELLO_S = rpc._IDLE_S = 1"
ALLOC_BUFFER, SET_TENSOR, DEVICE_COUNT = 0, 6, 15


@contextmanager
def greeted(server: Server) -> Iterator[Callable[..., bytes]]:
    """Send the hello message; yield a function that sends bytes and reads N bytes."""
    with socket.create_connection(rpc.address(server.name), timeout=20) as client:

        def say(words: bytes, n_bytes: int) -> bytes:
            client.sendall(words)
            return answers.read(n_bytes)

        with client.makefile("rb") as answers:
            assert say(rpc._HELLO, 36).startswith(rpc._HELLO_ANSWER)
            yield say


def test_a_silent_client_is_replaced_by_another():
    with rpc_server(changed=IMPATIENT) as server:
        with socket.create_connection(rpc.address(server.name)):
            rpc._probe(server.name)
        with greeted(server) as say:
            time.sleep(1.5)  # a single client may be silent
            assert say(struct.pack("<BQ", DEVICE_COUNT, 0), 12)[8:] == struct.pack("<I", 1)
            rpc._probe(server.name)
            assert say(b"", 1) == b""


def test_a_client_cannot_fill_the_memory():
    with rpc_server("--memory", 0.001) as server:
        before = psutil.Process(server.process.pid).memory_info().rss
        with greeted(server) as say, suppress(ConnectionResetError):
            assert say(struct.pack("<BQ", SET_TENSOR, 2**31) + b"ten bytes.", 1) == b""
        assert psutil.Process(server.process.pid).memory_info().rss < before + 2**28
        with greeted(server) as say:
            for n_bytes, is_given in ((900_000, True), (200_000, False), (2**64 - 1, False)):
                answer = say(struct.pack("<BQIQ", ALLOC_BUFFER, 12, 0, n_bytes), 24)
                assert answer[16:] == struct.pack("<Q", n_bytes * is_given)


def test_an_unreachable_server_is_an_error():
    done = called("run", "model.gguf", "hello", "--rpc", "nonsense")
    assert (done.returncode, "give it as HOST:PORT" in done.stderr) == (2, True)
    for name in (f"127.0.0.1:{free_port()}", "a..b:50052"):
        with pytest.raises(PopError, match=f"the RPC server {name} cannot be reached"):
            rpc.Servers([name])
    with pytest.raises(PopError, match=r"a\.\.b is not an address of this machine"):
        rpc.serve("a..b", 50052, 1)


def test_a_server_without_rpc_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as client:
        name = f"127.0.0.1:{listening.getsockname()[1]}"
        asked = client.submit(rpc.Servers, [name])
        connection, _ = listening.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(PopError, match=f"{name} is not an RPC server"):
            asked.result(60)
        connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_server_that_dies_while_a_prompt_is_read_ends_the_process_with_a_reason(pop_file):
    program = """
import os, signal, sys
from pop_local import PopModel
from pop_local.engine.prompt.prompt import Prompt
model = PopModel.open(sys.argv[1], n_ctx=1024, n_batch=64, n_threads=1, rpc=[sys.argv[2]])
kill = lambda done, total: done and os.kill(int(sys.argv[3]), signal.SIGKILL)
model.read(Prompt(list(range(3, 300))), kill)
"""
    with rpc_server() as server:
        words = [sys.executable, "-c", program, pop_file, server.name, str(server.process.pid)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("llama.cpp gave up: ggml-rpc.cpp:")
    assert "Remote RPC server crashed" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("last", ["a b c d " * 60 + "\n", ""], ids=["asks", "ends"])
def test_a_chat_whose_server_dies_reports_it_and_is_saved(pop_file, tmp_path, last):
    with rpc_server() as server:
        words = ["chat", str(pop_file), "--rpc", server.name, "--threads", "1", "--max-tokens", "4"]
        chat = subprocess.Popen(
            [sys.executable, "-m", "pop_local", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"POP_LOCAL_STATE_DIR": str(tmp_path)},
            text=True,
        )
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        while "decode" not in chat.stderr.readline():
            pass
        while not list(tmp_path.rglob("*.popsession")):
            assert chat.poll() is None
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, said = chat.communicate(last, timeout=60)
    error, hint = said.splitlines()
    assert chat.returncode == 1
    assert error.startswith("error: llama.cpp gave up: ggml-rpc.cpp:")
    assert hint.startswith("hint: restart it (pop-local rpc-server)")
    assert bool(list(tmp_path.rglob("*.popsession"))) is bool(last)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_server():
    with rpc_server() as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == -signal.SIGINT


def test_a_public_server_causes_a_warning_and_a_used_port_an_error(servers):
    # A port in use on one address counts as in use on all.
    port = rpc.address(servers[0])[1]
    done = run("rpc-server", "--host", "0.0.0.0", "--port", port)
    assert "Anyone who can reach this port" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: cannot listen on 0.0.0.0 port {port}" in done.stderr
    names = ("127.evil.example", "localhost.evil", "127.0.0.2", "LocalHost")
    assert [is_loopback(name) for name in names] == [False, False, True, True]
