"""Test `pop-local eval`: options, output, refusals, look-ups."""

import json

import pytest
from typer.testing import CliRunner

from pop_local.cli import app
from pop_local.engine.llama import backend
from support.converted import converted
from support.shared_kv import make_shared
from support.synthetic import make_gguf

KEYS = {
    "copy_ppl_ratio",
    "copy_top1",
    "induction_delta_nll",
    "kl_first",
    "kl_mean",
    "kl_p99",
    "kl_se",
    "n_pruned",
    "n_windows",
    "lookups",
    "verdict",
    "ppl_full",
    "ppl_ratio",
    "top1_agreement",
}
SHORT = ("--windows", "2", "--context", "60", "--continuation", "20", "--threads", "1")


def evaluate(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def measured(*arguments):
    done = evaluate(*arguments, *SHORT, "--lookups", 0, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_json_contains_keys_of_one_depth(pop_file, text):
    report = measured(pop_file, "--text", text)
    assert set(report) >= KEYS
    assert (report["n_pruned"], report["n_windows"], report["n_skipped"]) == (2 * 43, 2, 4)
    assert report["text"]["name"] == "text.txt"
    assert report["projection"] == "own"


def test_rejects_switch_without_effect(pop_file, text, monkeypatch):
    """Make all rows full without the command's knowledge, which only the counters reveal."""
    real = backend.set_full_from
    monkeypatch.setattr(backend, "set_full_from", lambda ctx, sequence, _: real(ctx, sequence, 0))
    done = evaluate(pop_file, "--text", text, *SHORT, "--lookups", 0, "--json")
    assert done.exit_code == 1
    assert "should have pruned 43 of" in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_deeper_boundary_loses_and_gains_less(tmp_path, text):
    models = [make_gguf(tmp_path / f"{number}.gguf", "llama") for number in (6, 2)]
    deep, early = (
        measured(converted(model, tmp_path, boundary=int(model.stem)), "--text", text)
        for model in models
    )
    assert (deep["n_skipped"], early["n_skipped"]) == (2, 6)
    assert deep["kl_mean"] < early["kl_mean"]
    assert deep["speedup_limit"] < early["speedup_limit"]


def test_rejects_model_without_keys(tmp_path, text):
    plain = make_gguf(tmp_path / "plain.gguf", "gemma3")
    refused = evaluate(plain, "--text", text, *SHORT)
    assert refused.exit_code == 1
    assert "pop-local analyze" in refused.stderr


def test_measures_exactly_skipping_model_at_earlier_depth(tmp_path, text):
    model = converted(make_shared(tmp_path / "g.gguf", "gemma4"), tmp_path, boundary=2)
    report = measured(model, "--text", text)
    assert (report["boundary"], report["n_pruned"]) == (2, 2 * (60 - 1 - 16))
    assert report["speedup_limit"] > 1


@pytest.mark.parametrize(
    "options",
    [
        ["--lookups", "some"],
        ["--lookups", "-1"],
        ["--context", "1"],
    ],
)
def test_rejects_invalid_options(pop_file, options):
    assert evaluate(pop_file, *options).exit_code == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ctx", "100"], "the limit is 100"),
        (["--windows", "500"], "too short for 500 windows"),
        (["--context", "17"], "context of 17 tokens is too short"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_reports_impossible_measurement_in_one_error(pop_file, text, options, reason):
    given = [pop_file, "--text", text, *SHORT, "--lookups", 0, *options]
    done = evaluate(*given)
    assert done.exit_code == 1
    assert reason in " ".join(done.stderr.split())
    assert done.stdout == ""


# --- look-ups


@pytest.mark.slow
def test_reports_full_and_pruned_lookups(pop_file, text):
    options = (pop_file, "--text", text, *SHORT, "--lookups", 3)
    done = evaluate(*options, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    found = report["lookups"]
    assert (found["n"], found["n_documents"]) == (3, 1)
    assert found["logprob_full"] < 0 != found["logprob_lost"]
    expected = "answers none of the 3 questions correctly. Use --full to avoid any loss."
    assert report["verdict"].endswith(expected)
    said = " ".join(evaluate(*options).stdout.split())
    assert "0 of 3 correct with full reading, 0 with fast reading 0 lost, 0 gained, p = 1" in said
    assert report["verdict"] in said


def test_verdict_mentions_missing_lookups(pop_file, text):
    report = measured(pop_file, "--text", text)
    assert report["lookups"] is None
    assert "Exact strings: not measured." in report["verdict"]
