"""Test `pop-local pull`: URLs, and interruptions."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import Hub, Repo, serving
from support.program import Done, run

MODEL = b"GGUF" + random.Random(0).randbytes(700_000)
STALL = 5 << 16
COMMAND = [sys.executable, "-m", "pop_local", "pull"]


def pull(*arguments: str, **environment: str) -> Done:
    return run("pull", *arguments, **environment)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(repos={"acme/tiny": Repo({"tiny.gguf": MODEL})})) as hub:
        yield hub


def test_rejects_url_of_another_site(tmp_path):
    done = pull("https://example.org/tiny.gguf", "--dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: https://example.org/tiny.gguf is not a model on the Hugging Face Hub\n"
        "hint: download the file with a browser or with `curl -LO`, and pass its path\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_keeps_partial_download_and_explains_resuming(hub, tmp_path):
    hub.stall = STALL
    partial = tmp_path / "tiny.gguf.partial"
    with subprocess.Popen(
        [*COMMAND, "hf:acme/tiny", "--dir", str(tmp_path)],
        env=os.environ | hub.environment(),
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
    assert [path.name for path in left] == ["tiny.gguf.partial"]
    done = pull("hf:acme/tiny", "--dir", str(tmp_path), **hub.environment())
    assert done.returncode == 0, done.stderr
    assert hub.downloads()[-1].headers["range"] == f"bytes={STALL}-"
    assert (tmp_path / "tiny.gguf").read_bytes() == MODEL
