"""Test `pop-local bench`: JSON, table, refusals, and that no cached prefix is timed."""

import json
import re

import pytest

from pop_base.errors import PopError
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.reading import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure import speed
from pop_local.measure.speed import (
    Run,
    require_rows,
    run_rounds,
    text_prompt,
)
from pop_local.workflows import bench as workflow
from support.calls import first_of
from support.converted import converted
from support.program import Done, called
from support.shared_kv import make_shared
from support.synthetic import make_gguf

SPREAD = {"median", "min", "max"}
ONE_PAIR = "One pair of runs does not show how much the times vary. Set --repeat to at least 3.\n"


def bench(*arguments: object) -> Done:
    return called("bench", *arguments, "--threads", 1)


def report(*arguments: object) -> dict:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    *rows, warning = [*done.stderr.splitlines(keepends=True), *["\n"] * (1 not in arguments)]
    assert warning == (ONE_PAIR if 1 in arguments else "\n")
    assert all(line.startswith("pop-local reads a prompt of") for line in rows)
    return json.loads(done.stdout)


def test_json_has_documented_shape(pop_file):
    result = report(pop_file, "--prompt", "100,200", "--repeat", 2)
    where = {"boundary", "n_layer", "is_exact", "min_prompt"}
    how = {"backend", "kernels", "upstream"}
    assert set(result) == {"model", "sidecar", "rows"} | where | how
    assert (result["boundary"], result["n_layer"], result["is_exact"]) == (4, 8, False)
    assert result["model"] == str(pop_file)
    assert "1 thread" in result["backend"]
    for n_prompt, row in zip([100, 200], result["rows"], strict=True):
        assert (row["n_prompt"], row["n_pruned"]) == (n_prompt, n_prompt - 17)
        for name in ("full_ttft_s", "pop_ttft_s", "speedup"):
            assert set(row[name]) == SPREAD
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert set(row["decode_tokens_per_s"]) == {"full", "pop"}
        assert min(row["decode_tokens_per_s"].values()) > 0
        assert row["n_deep"] == 0
        assert len(row) == 9


def test_reports_a_busy_machine(pop_file, monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 100.0)
    done = bench(pop_file, "--prompt", "100", "--repeat", 2)
    assert re.match(r"Other programs are using [\d.]+ CPUs, so the times are", done.stderr)


def test_measures_prompt_too_short_for_pruning(tmp_path):
    path = converted(make_gguf(tmp_path / "model.gguf", "llama"), tmp_path, min_prompt=200)
    short, long = report(path, "--prompt", "199,200", "--repeat", 1)["rows"]
    assert (short["n_pruned"], long["n_pruned"]) == (0, 200 - 17)


def test_counts_deep_rows(pop_file):
    arguments = (pop_file, "--prompt", "800", "--repeat", 1, "--deep-rows", "spelling")
    [row] = report(*arguments)["rows"]
    assert 0 < row["n_deep"] < 800 - 17
    assert row["n_pruned"] == 800 - 17 - row["n_deep"]
    assert "Deep" in bench(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "100", "--ctx", "64"), "the context has only 64"),
        (("--prompt", "5000"), "but the limit is 4096"),
    ],
)
def test_rejects_prompt_larger_than_context(pop_file, arguments, said):
    done = bench(pop_file, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_ignores_context_setting(pop_file, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_CTX", "64")
    assert bench(pop_file, "--prompt", "100", "--repeat", 1).returncode == 0


@pytest.mark.parametrize("lengths", ["", "0", "100,", "100,x", "-5", "9" * 5000])
def test_rejects_invalid_lengths(pop_file, lengths):
    assert bench(pop_file, "--prompt", lengths).returncode == 2


def test_rejects_unconverted_model_with_hint(tmp_path):
    done = bench(make_gguf(tmp_path / "plain.gguf", "llama"))
    assert done.returncode == 1
    assert "has not been converted" in done.stderr
    assert "pop-local convert" in done.stderr


# --- measurements


@pytest.fixture
def model(pop_file):
    return PopModel(EngineOptions.of(pop_file, n_ctx=512, n_threads=1))


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_rejects_cached_prefix(model, mode, monkeypatch):
    tokens = text_prompt(model, 100)
    speed.run(model, mode, tokens)
    monkeypatch.setattr(first_of(model).cache, "clear", lambda: None)
    with pytest.raises(PopError, match="is invalid"):
        speed.run(model, mode, tokens)


def test_rejects_run_without_pruning(model):
    require_rows(model, Mode.CONTEXT, Prompt(range(100)), Counters(83, 17))
    with pytest.raises(PopError, match="is invalid"):
        require_rows(model, Mode.CONTEXT, Prompt(range(100)), Counters(0, 100))


def test_rounds_alternate_and_first_is_discarded():
    order: list[Run] = []

    def way(seconds: float) -> Run:
        order.append(Run(seconds + len(order) / 10, 1.0, Read(0, 0, Counters(0, 0))))
        return order[-1]

    full, pop = run_rounds([lambda: way(1.0), lambda: way(2.0)], 2)
    assert [int(one.ttft_s) for one in order] == [2, 1, 1, 2, 2, 1]
    assert full == [order[2], order[5]] and pop == [order[3], order[4]]


def test_shows_each_row_when_measured(pop_file):
    done = bench(pop_file, "--prompt", "100,200,300", "--repeat", 2)
    shown = re.findall(r"pop-local reads a prompt of (\d+) tokens in [\d.]+ s", done.stderr)
    assert shown == ["100", "200"]
    assert "pop-local reads a prompt of 300 tokens" in done.stdout


def test_long_measurement_announces_its_duration(pop_file):
    done = bench(pop_file, "--prompt", "100,1000", "--repeat", 3)
    first, *_ = done.stderr.split(". ")
    assert first.startswith("With a catalog model, bench usually takes 4 to 15 minutes")
    assert "usually takes" not in bench(pop_file, "--prompt", "512", "--repeat", 1).stderr


def test_measures_upstream_kernels_for_comparison(pop_file, monkeypatch):
    monkeypatch.setattr(workflow, "cpu_kernels", lambda: "some")
    monkeypatch.setattr(workflow, "has_kernels", lambda: True)
    result = report(pop_file, "--prompt", "100", "--repeat", 1, "--gpu-layers", 0)
    assert result["kernels"] == "some"
    assert "flash attention" in result["upstream"]
    assert set(result["rows"][0]["upstream_ttft_s"]) == SPREAD


def test_measures_exactly_skipping_model_without_conversion(tmp_path):
    model = make_shared(tmp_path / "shared.gguf", "gemma4")
    result = report(model, "--prompt", "100", "--repeat", 1)
    [row] = result["rows"]
    assert (row["n_pruned"], row["n_skipped_exact"]) == (0, 99)
    table = bench(model, "--prompt", "100", "--repeat", 1).stdout
    assert "skip layers 4 to 7 of 8, exactly" in " ".join(table.split())
