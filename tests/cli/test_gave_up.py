"""Test that the error is readable if llama.cpp ends the process for a damaged file."""

import signal
import struct
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from pop_converter.gguf.header import read_header
from support.converted import names
from support.program import called
from support.serving import served
from support.synthetic import make_gguf

ABORT = """
from pop_local.engine.llama.devices import ggml
from pop_local.server.worker import Worker
Worker._answer = lambda *_: ggml("ggml_abort", None, b"ops.cpp", 1, b"chance")
"""
# This simulates an assertion that no check prevents.
UNCHECKED = """
from pop_local.engine.llama import loading
loading.require_loadable = lambda _: None
"""


@pytest.fixture
def path(tmp_path) -> Path:
    """Write a model with a wrong RoPE dimension, for which GGML_ASSERT ends the process."""
    path = make_gguf(tmp_path / "model.gguf", "qwen2")
    end = read_header(path).keys["qwen2.rope.dimension_count"].end
    data = path.read_bytes()
    path.write_bytes(data[: end - 4] + struct.pack("<I", 16) + data[end:])
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"<0x41>", "two tokens have the same text"),
        (b"<0x", "the text cannot be tokenized: the vocabulary is damaged"),
    ],
)
def test_reports_damaged_vocabulary(tmp_path, name, reason):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(name, b"<1x" if name == b"<0x" else b"<0x42>"))
    done = called("run", path, "☃", "--threads", 1, "--ctx", 64, "--max-tokens", 2)
    assert (done.returncode, reason in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    "command",
    [("run",), ("serve", "--port", 0)],
    ids=lambda command: "-".join(map(str, command)),
)
def test_every_command_reports_abort_reason(tmp_path, path, command):
    name, *options = command
    program = f"{UNCHECKED}\nfrom pop_local.__main__ import main; main()"
    words = [sys.executable, "-c", program, name, path, *options, "--threads", 1]
    done = subprocess.run([*map(str, words)], input="hello\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: llama.cpp aborted: qwen2.cpp" in done.stderr
    assert "hint: the model file may be damaged" in done.stderr
    assert names(tmp_path) == {path.name}


def test_server_exits_after_abort(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    with served(path, "--ctx", 64, changed=ABORT) as server:
        with pytest.raises(httpx2.TransportError):
            server.post("completions", prompt="hello")
        assert server.process.wait(60) == 1
        assert "error: llama.cpp aborted: " in server.log


@pytest.mark.skipif(sys.platform == "win32", reason="the exit status of POSIX")
def test_python_program_receives_abort_reason(path):
    opens = "import sys; from pop_local import PopModel; PopModel.open(sys.argv[1], n_threads=1)"
    program = UNCHECKED + opens
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("llama.cpp aborted: qwen2.cpp:")


@pytest.mark.skipif(sys.platform == "win32", reason="the exit status of POSIX")
def test_reports_an_uncaught_exception(tmp_path):
    """Remove a token that llama_tokenize needs, so that an exception leaves the C function."""
    path = make_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"<0x", b"<1x"))
    program = """
import sys
from pop_local.engine.llama import backend
api = backend.bindings()
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
text = "☃".encode()
tokens = (api.llama_token * 8)()
api.llama_tokenize(api.llama_model_get_vocab(model), text, len(text), tokens, 8, False, False)
"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "llama.cpp aborted: llama-pop.cpp" in done.stderr
