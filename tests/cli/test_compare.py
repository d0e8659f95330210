"""Test `pop-local compare`: comparing, storing and resuming both answers to each prompt."""

import json
import re

import pytest
from typer.testing import CliRunner

from pop_local.cli import app
from support.converted import tiny
from support.synthetic import make_gguf

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SHARED = " ".join(f"word{number}" for number in range(30))


@pytest.fixture(scope="module")
def pop_file(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("prompts"), chat_template=TEMPLATE)


@pytest.fixture
def mine(tmp_path):
    """Write two long prompts with a common start, which are pruned, and a short prompt."""
    path = tmp_path / "mine.jsonl"
    entries = [
        {"prompt": "Who?", "documents": [SHARED], "answer": {"regex": ""}},
        {"prompt": "What is it?", "documents": [SHARED], "answer": "never said"},
        {"messages": [{"role": "user", "content": "Hm"}]},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def answered(*arguments: object):
    options = ("--threads", 1, "--max-tokens", 8, "--ctx", 512)
    return CliRunner().invoke(app, ["compare", *map(str, (*arguments, *options))])


def compared(*arguments: object):
    done = answered(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_both_answers_are_compared(pop_file, mine):
    report = compared(pop_file, mine)
    first, second, short = report["answers"]
    assert report["n"] == 3
    assert report["n_judged"] == 2
    assert report["full_hits"] == report["pruned_hits"] == 1
    assert (report["n_only_full"], report["n_only_pruned"], report["p_value"]) == (0, 0, 1)
    assert (first["is_full_right"], second["is_pruned_right"]) == (True, False)
    assert short["is_full_right"] is None
    assert (short["first_difference"], report["n_unpruned"]) == (None, 2)
    assert report["n_same"] == sum(
        answer["first_difference"] is None for answer in report["answers"]
    )
    assert first["full"]["n_pruned"] == 0 < first["pruned"]["n_pruned"]
    assert min(first["full"]["ttft_s"], first["pruned"]["ttft_s"]) > 0
    for mode in ("full", "pruned"):
        assert second[mode]["n_cached"] > 100, "a common prefix is read once"


def test_table_shows_differing_answers(pop_file, mine):
    done = answered(pop_file, mine)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith(" Use --full to avoid any loss.\n")
    facts = " ".join(done.stdout.split())
    right = "full reading: 1 of 2, fast reading: 1 of 2"
    only = "correct only with full reading: 0, correct only with fast reading: 0"
    assert f"Correct answers {right} {only}" in facts
    odds = "the probability that chance alone would produce a difference this large"
    assert f"p = 1, {odds} (McNemar's exact test)" in facts
    assert "Read in full 2 of 3 prompts. Short or mostly cached prompts" in facts
    assert re.search(r"fast reading: [\d.]+ s \(\d+\.\d\dx\)\. Each prompt was timed once\.", facts)
    report = compared(pop_file, mine)
    table = done.stdout.partition("\n\n")[0].splitlines()
    assert report["n_same"] < 3
    assert len(table) == 2 + 3 - report["n_same"]


def test_reports_oversized_prompts(pop_file, mine):
    mine.write_text(json.dumps({"prompt": SHARED * 10}))
    refused = answered(pop_file, mine)
    assert refused.exit_code == 1
    assert "line 1: the prompt has" in refused.stderr
    assert "--ctx" in refused.stderr


def test_rejects_model_that_prunes_nothing(mine, tmp_path):
    refused = answered(make_gguf(tmp_path / "plain.gguf", "llama"), mine)
    assert refused.exit_code == 1
    assert "so there is nothing to compare" in refused.stderr
    assert "convert it first: pop-local convert" in refused.stderr
