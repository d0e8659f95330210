"""Test `pop-local analyze`: options, output, refusals, and the real models' figures."""

from types import SimpleNamespace

import pytest

from pop_converter.base.errors import PlanError
from pop_local.measure.budget import boundaries
from pop_local.research import analyze as research
from support.analyzed import analyze, report
from support.converted import paired
from support.synthetic import make_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("analyze") / "tiny.gguf", "llama", n_layer=6)


# --- output


def test_json_has_all_boundaries(model):
    found = report(model)
    assert [row["boundary"] for row in found["boundaries"]] == [5, 4, 3]
    last = found["boundaries"][0]
    assert last["quality"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert last["projection"] == "own"
    assert {"speedup_limit", "induction_retention"} <= set(last)


def test_the_figures_are_the_same_again(model):
    assert report(model) == report(model)


def test_a_pipe_gets_one_table_and_the_findings(model):
    done = analyze(model, "--markdown")
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert "Induction" in table[0]
    assert "budget" in done.stdout.splitlines()[-1]
    assert "|" not in analyze(model).stdout


def test_where_copying_is_lost_nothing_else_is_measured(model, monkeypatch):
    monkeypatch.setattr(research, "may_copy", lambda retention: False)
    first, *others = report(model)["boundaries"]
    assert first["quality"] is not None
    assert [(row["projection"], row["quality"]) for row in others] == [(None, None)] * 2
    lines = analyze(model, "--markdown").stdout.splitlines()
    head, _, *rows = ([*map(str.strip, line.split("|"))] for line in lines if line.startswith("|"))
    kinds = {row[1]: row[head.index("K/V")] for row in rows}
    assert [kinds[layer] for layer in ("3", "4", "5")] == ["", "", "own"]


# --- refusals


@pytest.mark.parametrize("projection", ["own", "fitted"])
def test_a_converted_file_is_refused(tmp_path, projection):
    base = make_gguf(tmp_path / "base.gguf", "llama", n_layer=6)
    done = analyze(paired(base, tmp_path, projection, boundary=3).single)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "is already converted" in message
    assert "use the original model" in message


# --- boundaries


@pytest.mark.parametrize(("n_layer", "deepest"), [(2, 1), (3, 1), (18, 9), (30, 15)])
def test_the_deeper_half_is_probed(n_layer, deepest):
    found = boundaries(SimpleNamespace(n_layer=n_layer, n_deepstack=0))  # type: ignore[arg-type]
    assert (found[0], found[-1]) == (n_layer - 1, deepest)


def test_a_single_layer_has_nothing_to_skip():
    with pytest.raises(PlanError):
        boundaries(SimpleNamespace(n_layer=1))  # type: ignore[arg-type]
