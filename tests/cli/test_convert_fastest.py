"""`convert --select` and `--quality fastest`: a selection is chosen, measured, stored and used."""

import json

import pytest
from typer.testing import CliRunner

from pop_local.cli import app
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate
from pop_local.workflows.conversion import fastest
from pop_local.workflows.conversion.goals import Fastest
from support.searched import convert
from support.shapes import read_pop_meta, read_shape
from support.synthetic import make_gguf

pytestmark = pytest.mark.usefixtures("short_fastest")
QUICK = ("--projection", "own", "--threads", "1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("select") / "model.gguf", "llama")


def meta_of(path):
    meta = read_pop_meta(path)
    assert meta is not None
    return meta


@pytest.fixture
def found(monkeypatch):
    """The shares that the probe is to find, recipe by recipe; the full model finds 0.8."""
    shares: list[float] = []

    def told(*_):
        share, nothing = shares.pop(0), Estimate(0.0, None)
        found, lost = Estimate(share, None), Estimate(0.8 - share, None)
        return fastest.Recall(2, 400, nothing, nothing, Estimate(0.8, None), found, lost)

    monkeypatch.setattr("pop_local.measure.recall.RecallReference.compared", told)
    return shares


def test_a_selection_is_stored_and_used(plain, tmp_path):
    out = tmp_path / "out.gguf"
    done = convert(plain, out, "--boundary", 4, "--select", "10%", *QUICK)
    assert done.exit_code == 0, done.output
    meta = meta_of(out)
    assert (meta.boundary, meta.select) == (4, 0.1)
    assert meta.measured is not None and meta.refilled is not None
    # Rows that get their depth bring a random model nearer to the full one.
    assert meta.refilled.n_rows == 8
    assert 0 < meta.refilled.kl_mean < meta.measured.kl_mean
    assert "10% of the others, which the question needs" in " ".join(done.output.split())
    assert PopModel(out, n_ctx=512, n_threads=1).rule.select == 0.1
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert "10% of the others" in " ".join(shown.split())
    assert "all of them: the full model" in " ".join(shown.split())
    assert read_pop_meta(plain) is None


def test_the_first_recipe_that_recalls_is_taken(plain, tmp_path, found):
    out = tmp_path / "out.gguf"
    found += [0.2, 0.74, 0.76, 0.9]
    done = convert(plain, out, "--quality", "fastest", "--json", *QUICK)
    assert done.exit_code == 0, done.output
    recipes = Fastest().plans(read_shape(plain), macs=GraphMacs(plain))
    tried = [plan.boundary for plan in recipes[:3]]
    report = json.loads(done.stdout)
    meta = meta_of(out)
    assert meta.budget is not None
    assert meta.boundary == report["boundary"] == tried[2]
    assert meta.select == report["select"] > 0
    assert meta.budget.quality == "fastest"
    assert meta.budget.tried.count("boundary") == 3
    assert found == [0.9]


def test_dry_run_names_all_recipes(plain):
    recipes = Fastest().plans(read_shape(plain), macs=GraphMacs(plain))
    wanted = (plain, "--quality", "fastest", "--dry-run")
    facts = " ".join(convert(*wanted).stdout.split())
    assert ", ".join(f"{plan.boundary} with {plan.select:.0%}" for plan in recipes) in facts
    assert "Fitted on" in facts
    planned = json.loads(convert(*wanted, "--json").stdout)
    told = [(each["boundary"], each["select"]) for each in planned["recipes"]]
    assert told == [(plan.boundary, plan.select) for plan in recipes]
    assert not {"boundary", "select"} & set(planned)


def test_recipes_come_from_the_fastest_on(plain):
    recipes = Fastest().plans(read_shape(plain), macs=GraphMacs(plain))
    limits = [plan.speedup_limit for plan in recipes]
    assert limits == sorted(limits, reverse=True)
    assert len(limits) == 6


def test_without_recall_nothing_is_written(plain, tmp_path, found):
    out = tmp_path / "out.gguf"
    found += [0.2, 0.2]
    arguments = (plain, out, "--skip", "1/2", "--select", "5%", *QUICK)
    done = convert(*arguments)
    assert done.exit_code == 1
    assert "facts are found again less often than by the full model (80%)" in done.stderr
    assert "--select" in done.stderr
    assert not out.exists()
    assert convert(*arguments, "--force").exit_code == 0
    assert meta_of(out).select == 0.05


def test_force_replaces_but_does_not_take_any_recipe(plain, tmp_path, found):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")
    found += [0.2] * 6
    done = convert(plain, out, "--quality", "fastest", "--force", *QUICK)
    assert done.exit_code == 1
    assert found == []
    assert out.read_bytes() == b"before"


@pytest.mark.parametrize(
    "options",
    [
        ("--select", "10%"),
        ("--select", "10%", "--quality", "fast"),
        ("--select", "200%", "--skip", "1/2"),
        ("--quality", "fastest", "--max-kl", "0.1"),
        ("--quality", "fastest", "--skip", "1/2"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(plain, options):
    assert convert(plain, *options, *QUICK).exit_code == 2
