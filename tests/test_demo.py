"""`pop-local demo` on the real SmolLM2, as `make demo` runs it."""

import importlib.resources
import json
import os
import subprocess
import sys

import pytest
from converted import converted, tiny
from synthetic import make_gguf

pytestmark = pytest.mark.slow


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pop_local", "demo", "--threads", "1", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=900,
    )


@pytest.fixture(scope="module")
def pop_file(smollm2, tmp_path_factory):
    return converted(smollm2, tmp_path_factory.mktemp("demo"), boundary=20)


def test_it_answers_twice_tells_both_times_and_leaves(pop_file):
    done = demo(pop_file)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("first token after") == 2
    assert "Which quarry did the stone come from?" in done.stdout
    assert done.stdout.count("Tolm") == 2, "both answers know it from the document"
    assert "Speed-up: " in done.stdout
    assert "analytical limit 1.43x" in done.stdout
    assert "they skipped 10 of 30 layers" in done.stdout


def test_json_has_the_same_and_the_counters_add_up(pop_file):
    found = json.loads(demo(pop_file, "--json").stdout)
    full, pop = found["full"], found["pop"]
    assert found["n_prompt"] >= 1500
    assert (full["n_pruned"], full["n_full"]) == (0, found["n_prompt"])
    assert (pop["n_pruned"], pop["n_full"]) == (found["n_prompt"] - 17, 17)
    assert found["speedup"] == pytest.approx(full["ttft_s"] / pop["ttft_s"])
    assert full["text"] and pop["text"]


def test_the_document_is_long_enough(pop_file):
    from pop_local.engine.model import open_model

    text = (importlib.resources.files("pop_local") / "data" / "document.md").read_bytes()
    assert len(open_model(pop_file, n_ctx=256).tokenize(text)) >= 1500


def test_an_unconverted_model_is_refused(tmp_path):
    done = demo(make_gguf(tmp_path / "plain.gguf", "llama"))
    assert done.returncode == 1
    assert "pop-local convert" in done.stderr


def test_a_context_too_small_for_the_document_says_so(tmp_path):
    done = demo(tiny(tmp_path), "--ctx", 512)
    assert done.returncode == 1
    assert "the context holds 512" in done.stderr
    assert "Traceback" not in done.stderr
