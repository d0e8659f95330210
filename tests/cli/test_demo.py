"""Test `pop-local demo` on the real SmolLM2, as `make demo` runs it, and on a random model."""

import json
import re

import pytest

from pop_local.workflows import demo as workflow
from support.converted import converted
from support.program import Done, called, run
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

WIDE = ("--ctx", "16384")


def demo(*arguments: object) -> Done:
    return called("demo", "--threads", 1, *arguments)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    # With more layers, a prompt of this length is slow.
    folder = tmp_path_factory.mktemp("demo")
    source = make_gguf(
        folder / "m.gguf", "llama", n_layer=3, n_embd=64, n_head=2, n_ff=64, n_ctx_train=16384
    )
    return converted(source, folder, boundary=2)


def test_real_model_answers_twice(smollm2):
    """Run the command of `make demo`, with the shipped sidecar."""
    done = run("demo", "--threads", 1, smollm2, "--pairs", 1)
    assert done.returncode == 0, done.stderr
    allowed = re.compile(r".* left|Other programs are using .+ CPUs, so the times are unreliable\.")
    assert [line for line in done.stderr.splitlines() if not allowed.fullmatch(line)] == []
    assert done.stdout.count("reading, the first token took") == 2
    assert "What rule was painted above the lamp-room door?" in done.stdout
    assert done.stdout.count("The light is never late") == 2, "both answers are in the document"
    assert "x. The operation count predicts a speedup of 1.21x." in done.stdout
    assert " of 2,063 tokens." in done.stdout and "skipped 7 of 30 layers for " in done.stdout


@pytest.fixture
def short(monkeypatch):
    """Shorten the document, which has about 9,000 tokens in a byte-level vocabulary."""
    monkeypatch.setattr(workflow, "_text", lambda name, real=workflow._text: real(name)[:1000])


def test_json_contains_all_figures_and_counters_add_up(tiny_file, short):
    report = json.loads(demo(tiny_file, *WIDE, "--pairs", 1, "--json").stdout)
    full, pop = report["full"], report["pop"]
    assert (full["n_pruned"], full["n_full"]) == (0, report["n_prompt"])
    assert (pop["n_pruned"], pop["n_full"]) == (report["n_prompt"] - 17, 17)
    assert report["speedup"]["median"] == pytest.approx(full["ttft_s"] / pop["ttft_s"])
    assert report["limit"] > 1
    assert full["text"] and pop["text"]


def test_speedup_is_median_of_pairs(tiny_file, short):
    done = demo(tiny_file, *WIDE, "--pairs", 2)
    pairs = r"Speedup: (.+)x \(median of 2, range (.+)-(.+)\)\. .+ predicts a speedup of 1\."
    said = re.search(pairs, done.stdout)
    assert said is not None, done.stdout
    middle, least, most = map(float, said.groups())
    assert least <= middle <= most
    assert done.stdout.count(" s (median):") == 2


def test_reports_a_context_too_small_for_the_document(tiny_file):
    done = demo(tiny_file, "--ctx", 512)
    assert done.returncode == 1
    assert "the context holds 512" in done.stderr
    assert "Traceback" not in done.stderr
