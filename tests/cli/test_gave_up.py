"""llama.cpp ends the process for some damaged files: why is to be read, and not a dead shell."""

import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from converter.header import read_header
from support.program import run
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


@pytest.mark.skipif(sys.platform == "win32", reason="the exit status of POSIX")
def test_a_program_is_told_too(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    two_tokens_of_one_text(path)
    program = "import sys; from pop_local import PopModel; PopModel(sys.argv[1], n_threads=1)"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("llama.cpp gave up: llama-vocab.cpp:")
