"""llama.cpp ends the process for some damaged files: why is to be read, and not a dead shell."""

import signal
import struct
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from pop_converter.gguf.header import read_header
from support.converted import names
from support.program import run
from support.serving import served
from support.synthetic import make_gguf


def negative_epsilon(path: Path) -> None:
    """It is divided by in the first layer."""
    end = read_header(path).keys["llama.attention.layer_norm_rms_epsilon"].end
    data = path.read_bytes()
    path.write_bytes(data[: end - 4] + struct.pack("<f", -1.0) + data[end:])


def two_tokens_of_one_text(path: Path) -> None:
    """llama_cpp silences stderr while it opens a model."""
    path.write_bytes(path.read_bytes().replace(b"<0x41>", b"<0x42>"))


def no_tokens_of_bytes(path: Path) -> None:
    """An exception that no function of llama.cpp catches."""
    path.write_bytes(path.read_bytes().replace(b"<0x", b"<1x"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (negative_epsilon, "eps >= 0"),
        (two_tokens_of_one_text, "id_to_token.size()"),
        (no_tokens_of_bytes, "unordered_map::at"),
    ],
)
def test_the_reason_is_said(tmp_path, damage, reason):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    damage(path)
    done = run("run", path, "☃", "--threads", 1, "--ctx", 64, "--max-tokens", 2)
    error, hint = [line for line in done.stderr.splitlines() if line.startswith(("error", "hint"))]
    assert done.returncode == 1
    assert error.startswith("error: llama.cpp gave up: ") and reason in error
    assert hint.startswith("hint: the model's file may be damaged")


@pytest.mark.parametrize(
    "command",
    [
        ("chat",),
        ("serve", "--port", 0),
        ("bench", "--boundary", 5),
        ("convert", "--boundary", 5),
        ("convert", "--boundary", 5, "--projection", "own"),
    ],
    ids=lambda command: "-".join(map(str, command)),
)
def test_whatever_opens_it(tmp_path, command):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    two_tokens_of_one_text(path)
    name, *options = command
    done = run(name, path, *options, "--threads", 1, text="hello\n")
    assert done.returncode == 1
    assert "error: llama.cpp gave up: llama-vocab.cpp" in done.stderr
    assert names(tmp_path) == {path.name}


def test_a_request_to_the_server(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    negative_epsilon(path)
    with served(path, "--ctx", 64) as server:
        with pytest.raises(httpx2.TransportError):
            server.post("completions", prompt="hello")
        assert server.process.wait(60) == 1
        assert "error: llama.cpp gave up: " in server.log


@pytest.mark.skipif(sys.platform == "win32", reason="the exit status of POSIX")
def test_a_program_is_told_too(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    two_tokens_of_one_text(path)
    program = "import sys; from pop_local import PopModel; PopModel(sys.argv[1], n_threads=1)"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("llama.cpp gave up: llama-vocab.cpp:")
