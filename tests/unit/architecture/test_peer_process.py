"""Check how measure_peers.py talks to an engine in another environment, with a stand-in engine."""

import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from support.paths import TESTS

sys.path.append(str(TESTS / "bench"))
from peer_process import PeerError, PeerProcess

ENGINE = """
import os
from types import SimpleNamespace

print("an engine's log")  # must not reach the answers
COUNT_ERRORS = {count_errors}

class Which:
    def GGUF(quantized_model_id, quantized_filename):
        if quantized_filename == "unknown.gguf":
            raise ValueError("unknown tensor type")

class CompletionRequest(SimpleNamespace):
    pass

class Runner:
    def __init__(self, which, prefix_cache_n, token_source):
        assert os.environ["RAYON_NUM_THREADS"] == "1"

    def send_completion_request(self, request):
        n_prompt = 1 + len(request.prompt.split())  # with a start token
        n_prompt += COUNT_ERRORS and n_prompt > 100
        usage = SimpleNamespace(prompt_tokens=n_prompt, completion_tokens=request.max_tokens)
        return SimpleNamespace(usage=usage)
"""


def opened(folder: Path, model: str, count_errors: bool = False) -> PeerProcess:
    """Return a process whose interpreter finds the stand-in instead of the engine."""
    packages = folder / "packages"
    metadata = packages / "mistralrs-1.2.3.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mistralrs\nVersion: 1.2.3\n")
    (packages / "mistralrs.py").write_text(ENGINE.format(count_errors=count_errors))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    options = Namespace(model=str(folder / model), threads=1, clock="wall", verbose=False)
    return PeerProcess(python, "mistralrs", options)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in interpreter is a shell script")
class TestPeerProcess:
    def test_counts_the_start_token_and_ignores_the_engines_log(self, tmp_path: Path) -> None:
        process = opened(tmp_path, "model.gguf")
        assert process.about == {"version": "1.2.3"}
        assert process.seconds(512, 1) > 0
        assert process.seconds(16, 33) > 0
        process.close()

    def test_reports_why_a_model_does_not_open(self, tmp_path: Path) -> None:
        with pytest.raises(PeerError, match="ValueError: unknown tensor type"):
            opened(tmp_path, "unknown.gguf")

    def test_rejects_other_token_counts_than_requested(self, tmp_path: Path) -> None:
        process = opened(tmp_path, "model.gguf", count_errors=True)
        with pytest.raises(PeerError, match="512 and 1 tokens requested"):
            process.seconds(512, 1)
        process.close()
