"""Test `convert` within a budget, on tiny models and few windows."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.popfile.format import DeepRows
from pop_local.calibration import needs
from pop_local.calibration.fit_options import FitOptions
from pop_local.measure import budget
from pop_local.measure.budget import BALANCED
from pop_local.workflows.conversion import convert_model
from pop_local.workflows.conversion import search as searching
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, Within
from pop_local.workflows.hardware import Hardware
from support.conversion_runs import FEW, LOOSE, convert
from support.converted import names
from support.shapes import read_pop_meta

TRADE_ROWS = searching.Search.trade_rows
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_search")]

# Runs the command, which waits forever in the first candidate's measurement.
STOPPED = """
import sys, time

from pop_local.workflows.conversion import search

def measure(reference, model, pruning, advance, known):
    print("measuring", flush=True)
    while True:
        time.sleep(0.1)
        advance(0, 1)

search.measure_against = measure
from pop_local.cli import main
sys.argv = ["pop-local", "convert", *sys.argv[1:]]
main()
"""


def test_writes_deepest_boundary_within_budget(tiny, letters, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    done = convert(tiny, "--sidecar", "--text", letters, *FEW, *LOOSE, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["boundary"], report["projection"]) == (2, "fitted")
    assert [trial["in_budget"] for trial in report["tried"]] == [True] * len(report["tried"])
    last = report["tried"][-1]
    assert (last["boundary"], last["n_windows"]) == (2, 2)
    assert last["kl_mean"] == report["measured"]["kl_mean"] > 0
    assert last["kl_se"] == report["measured"]["kl_se"] > 0
    assert 1 < last["speedup_limit"] == report["speedup_limit"]
    meta = read_pop_meta(tmp_path / "tiny.pop-sidecar.gguf")
    assert meta is not None and meta.budget is not None and meta.measured is not None
    assert (meta.budget.quality, meta.budget.max_kl) == ("custom", 50)
    assert meta.budget.tried == ", ".join(f"{boundary} (names) inside" for boundary in (5, 4, 3, 2))
    assert meta.measured.kl_mean == last["kl_mean"]
    assert meta.calibration is not None and meta.calibration.n_tokens == 2048
    assert not names(temporary)
    assert last["lookups"]["n"] == meta.measured.lookups_n > 0
    assert last["lookups"]["logprob_lost"] == meta.measured.lookups_logprob_lost
    assert report["verdict"].endswith("Use --full to avoid any loss.")


def test_tries_fewer_deep_rows_if_budget_allows(tiny, letters, tmp_path, monkeypatch):
    """Expect the candidate without deep rows, the fastest, since all are within the budget."""
    monkeypatch.setattr(searching.Search, "trade_rows", TRADE_ROWS)
    done = convert(tiny, "--sidecar", "--text", letters, *FEW, *LOOSE, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [trial["deep_rows"] for trial in report["tried"][-2:]] == ["spelling", "none"]
    assert (report["boundary"], report["deep_rows"], report["deep_share"]) == (2, "none", 0)
    meta = read_pop_meta(tmp_path / "tiny.pop-sidecar.gguf")
    assert meta is not None and meta.budget is not None and meta.deep_rows is DeepRows.NONE
    assert meta.budget.tried.endswith("2 (names) inside, 2 (spelling) inside, 2 inside")
    limits = [trial["speedup_limit"] for trial in report["tried"][-3:]]
    assert limits == sorted(limits) and limits[0] < limits[-1]


def test_each_stage_ends_at_100_percent(tiny, tmp_path):
    ends: list[tuple[str, tuple[int, int]]] = []
    watch = Watch(
        on_stage=lambda name, unit: ends.append((name, (0, 1))),
        on_progress=lambda *step: ends.append((ends.pop()[0], step)),
    )
    budget = replace(
        BALANCED, max_kl=50.0, max_ppl_ratio=1e3, max_copy_ratio=1e3, max_lost_lookups=1.0
    )
    options = ConvertOptions(Within(budget), FitOptions(2048), hardware=Hardware(1, 0))
    convert_model.convert(tiny, tmp_path / "out.gguf", options, watch=watch)
    # Writing is interrupted by a measurement, and then continues.
    last = dict(ends)
    assert [name for name, (done, total) in last.items() if done != total] == []
    assert {"Sampling text", "Fitting", "Writing and verifying"} < last.keys()


def test_strict_budget_skips_one_layer(tiny, tmp_path):
    """Expect one skipped layer: in a random model, only the last layer's projections are exact."""
    done = convert(tiny, *FEW, "--max-kl", 0.0001)
    assert done.exit_code == 0, done.stderr
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.budget is not None and meta.measured is not None
    assert (meta.boundary, meta.projection) == (7, "own")
    tried = "7 own (names) inside, 6 (names) outside, 5 (names) outside"
    assert meta.budget.tried == tried
    assert meta.measured.kl_mean == pytest.approx(0, abs=1e-6)
    _, _, table = done.stdout.partition("Inside\n")
    row = table.splitlines()[1].split()
    assert (row[0], row[-1]) == ("7", "yes")
    assert "custom allows KL 0.0001" in done.stdout


def test_rejects_named_boundary_outside_budget(tiny, letters, tmp_path):
    named = ("--text", letters, "--projection", "fitted", *FEW, "--boundary", 4, "--json")
    refused = convert(tiny, *named, "--max-kl", 0.0001)
    assert (refused.exit_code, refused.stdout) == (1, "")
    shown = " ".join(refused.stderr.split())
    assert ") exceeds the budget (KL 0.0001," in shown
    assert names(tmp_path) == {"tiny.gguf"}
    planned = json.loads(convert(tiny, *named, *LOOSE, "--dry-run").stdout)
    assert [plan["boundary"] for plan in planned["plans"]] == [4]
    assert planned["budget"]["max_kl"] == 50
    done = convert(tiny, *named, *LOOSE)
    assert done.exit_code == 0, done.stderr
    [trial] = json.loads(done.stdout)["tried"]
    assert (trial["boundary"], trial["in_budget"]) == (4, True)
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.budget is not None and meta.measured is not None
    assert (meta.boundary, meta.budget.tried) == (4, "4 (names) inside")


def test_own_projections_need_no_fit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("pop_local.workflows.conversion.fits.calibrate", None)
    done = convert(tiny, "--projection", "own", "--threads", 1, *LOOSE)
    assert done.exit_code == 0, done.stderr
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.measured is not None
    assert (meta.boundary, meta.projection, meta.calibration) == (2, "own", None)
    assert meta.measured.kl_mean > 0


@pytest.mark.parametrize(
    "options",
    [
        ("--quality", "fastest"),
        ("--quality", "fast", "--max-kl", 0.1),
        ("--quality", "balanced", "--max-copy-ratio", 1.1),
        ("--quality", "perfect"),
        ("--max-kl", -1),
        ("--max-kl", 0),
        ("--max-copy-ratio", 0),
    ],
)
def test_rejects_contradictory_options(tiny, tmp_path, options):
    assert convert(tiny, *options).exit_code == 2
    assert names(tmp_path) == {"tiny.gguf"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (
            ("--text", "short.txt"),
            "short.txt contains only 10 bytes, but this model needs at least 2,048 tokens",
        ),
        (("--text", os.devnull), "not a file"),
        (("--tokens", 100), "100 tokens are too few"),
    ],
)
def test_rejects_unusable_texts_before_measuring(tiny, tmp_path, monkeypatch, options, reason):
    monkeypatch.setattr(convert_model, "Search", None)
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("ten bytes.")
    for dry_run in ((), ("--dry-run",)):
        refused = convert(tiny, *options, *dry_run)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert reason in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_dry_run_prints_plan_of_model_with_shipped_sidecar(smollm2):
    done = convert(smollm2, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "Fast reading already works with this model" in " ".join(done.stderr.split())
    assert "Boundaries" in done.stdout


@pytest.mark.slow
def test_converts_model_with_shipped_sidecar(smollm2, monkeypatch):
    def stop(*args: object, **options: object) -> None:
        raise PopError("stopped")

    monkeypatch.setattr("pop_local.commands.convert.run_conversion", stop)
    done = convert(smollm2, "--sidecar", "--force")
    assert "stopped" in done.stderr


def test_dry_run_shows_range_of_candidates(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_model, "Search", None)
    done = convert(tiny, "--dry-run", "--quality", "near-lossless")
    assert done.exit_code == 0
    assert "7, 6, 5, 4, 3, 2" in done.stdout
    facts = " ".join(done.stdout.split())
    limits = r"up to \d\.\d\dx \(1\.\d\dx with the fewest skipped layers\)"
    assert re.search(rf"{limits} for [\d,]+ prompt tokens without deep rows", facts)
    assert "16,384 tokens in one pass" in facts
    assert re.search(r"Memory [\d.]+ MB for the fit's statistics", facts)
    short_of_memory = convert(tiny, "--dry-run", "--memory", 0).stdout
    assert "up to 15 passes" in " ".join(short_of_memory.split())
    assert "near-lossless allows KL 0.015, perplexity ratio 1.01" in facts
    planned = json.loads(convert(tiny, "--dry-run", "--max-kl", 0.2, "--json").stdout)
    assert [plan["boundary"] for plan in planned["plans"]] == [7, 6, 5, 4, 3, 2]
    assert (planned["distills"], planned["budget"]["max_kl"]) == (False, 0.2)
    assert planned["budget"]["max_copy_ratio"] == 1.1
    speedups = [plan["speedup_limit"] for plan in planned["plans"]]
    assert 1 < speedups[0] < 1.2 < speedups[-1] and speedups == sorted(speedups)
    assert f"{planned['memory_bytes'] / 1e6:.1f} MB for the fit's" in facts
    assert names(tmp_path) == {"tiny.gguf"}


def test_fits_few_boundaries_with_little_memory(tiny, letters, monkeypatch):
    """Limit the sums to two of the boundaries 2 to 6."""
    monkeypatch.setattr(needs, "MOST_SUMS_BYTES", 4_200_000)
    planned = convert(tiny, "--text", letters, *FEW, *LOOSE, "--dry-run")
    assert "Boundaries 7, 5, 3" in " ".join(planned.stdout.split())
    done = convert(tiny, "--text", letters, *FEW, *LOOSE, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    tried = [(trial["boundary"], trial["projection"]) for trial in report["tried"]]
    assert tried == [(5, "fitted"), (3, "fitted")]
    assert (report["boundary"], report["projection"]) == (3, "fitted")


def test_interrupted_conversion_leaves_no_file(tiny, letters, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, tiny, "--text", letters, *map(str, FEW), *map(str, LOOSE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert child.stdout is not None
    try:
        while "measuring" not in (line := child.stdout.readline()):
            assert line, child.communicate()[1]
        assert len(list(temporary.rglob("*.gguf"))) == 1
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    finally:
        child.kill()
        child.communicate()
    assert names(tmp_path) == {"tiny.gguf", "temporary"}
    assert not names(temporary)


@pytest.mark.parametrize("limit", ["is_inside", "keeps_lookups"])
def test_failed_search_leaves_no_file(tiny, letters, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(budget, limit, lambda *_: False)
    done = convert(tiny, "--text", letters, *FEW, *LOOSE)
    assert done.exit_code == 1
    assert "Fitting the projections for boundary 2, 3, 4, 5, 6" in done.stderr
    assert "the loss from skipping 1 layer (KL " in done.stderr
    assert "hint" in done.stderr
    assert done.stdout.rstrip(" |\n").endswith("no")
    assert names(tmp_path) == {"tiny.gguf"}
