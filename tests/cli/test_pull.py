"""Test `pop-local pull` with URLs."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import Hub, serving
from support.program import Done, called

MODEL = b"GGUF" + random.Random(0).randbytes(700_000)
STALL = 5 << 16
COMMAND = [sys.executable, "-m", "pop_local", "pull"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(plain={"tiny.gguf": MODEL})) as hub:
        yield hub


def pull(*arguments: str, **environment: str) -> Done:
    return called("pull", *arguments, **environment)


def test_a_url_goes_into_the_models_folder_and_its_path_is_printed(hub, tmp_path):
    done = pull(hub.url("tiny.gguf"), POP_LOCAL_MODELS_DIR=str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'store' / 'tiny.gguf'}\n"
    assert "Without --sha256" in done.stderr
    assert (tmp_path / "store" / "tiny.gguf").read_bytes() == MODEL


def test_a_right_hash_is_silent(hub, tmp_path):
    sha256 = hashlib.sha256(MODEL).hexdigest().upper()
    done = pull(hub.url("tiny.gguf"), "--dir", str(tmp_path), "--sha256", f"sha256:{sha256}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sha256", ["abc", "g" * 64, ""])
def test_invalid_hashes_are_refused(hub, tmp_path, sha256):
    done = pull(hub.url("tiny.gguf"), "--dir", str(tmp_path), "--sha256", sha256)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not a SHA-256 hash" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize("name", ["smollm2", "hf:a/b"])
def test_a_hash_is_for_urls(name):
    done = pull(name, "--sha256", "0" * 64)
    assert done.returncode == 2
    assert "--sha256 works only with a URL" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_keeps_the_download_and_mentions_how_to_resume(hub, tmp_path):
    hub.stall = STALL
    partial = tmp_path / "tiny.gguf.partial"
    with subprocess.Popen(
        [*COMMAND, hub.url("tiny.gguf"), "--dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size == STALL):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert "Run the same command again to resume the download." in err
    assert "Traceback" not in err
    left: list[Path] = sorted(tmp_path.iterdir())
    assert [path.name for path in left] == ["tiny.gguf.partial", "tiny.gguf.partial.origin"]
    done = pull(hub.url("tiny.gguf"), "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert hub.downloads()[-1].headers["range"] == f"bytes={STALL}-"
    assert (tmp_path / "tiny.gguf").read_bytes() == MODEL
