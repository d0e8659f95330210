"""Test `pop-local analyze`: options, output, refusals, and the real models' cliffs."""

import json
import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest

from pop_converter.base.errors import PlanError, PopError
from pop_local.measure.budget import boundaries
from pop_local.measure.estimate import Estimate
from pop_local.research import layer_analysis
from support.analyzed import analyze, report
from support.converted import paired
from support.synthetic import make_gguf

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("analyze") / "tiny.gguf", "llama", n_layer=6)


# --- output


def test_json_has_gates_and_boundaries(model, text):
    pytest.importorskip("torch")
    found = report(model, "--text", text)
    assert [row["boundary"] for row in found["boundaries"]] == [5, 4, 3]
    last = found["boundaries"][0]
    assert last["quality"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert last["projection"] == "own"
    assert {"speedup_limit", "induction_retention", "lost_retention"} <= set(last)
    gates = found["gates"]
    assert (gates["n_windows"], gates["n_context"], gates["n_answer"]) == (3, 64, 10)
    assert [len(gates[stage]["layers"]) for stage in ("prefill", "decode")] == [6] * 2
    assert gates["prefill"]["layers"][0]["value"] > gates["prefill"]["layers"][5]["value"] == 0
    assert found["text"]["name"] == "text.txt"


def test_a_seed_gives_the_same_figures_again(model, text):
    first, again, other = (report(model, "--text", text, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other | {"seed": 1}


def test_a_pipe_gets_one_table_and_the_findings(model, text):
    pytest.importorskip("torch")
    done = analyze(model, "--text", text)
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert "Prefill" in table[0]
    assert "Induction" in table[0]
    for label in ("Reading", "Answering", "Copying"):
        assert label in done.stdout


def test_where_copying_is_lost_nothing_else_is_measured(model, text, monkeypatch):
    monkeypatch.setattr(layer_analysis, "may_copy", lambda retention: False)
    given = (model, "--text", text)
    first, *others = report(*given)["boundaries"]
    assert first["quality"] is not None
    assert [(row["projection"], row["quality"]) for row in others] == [(None, None)] * 2
    lines = analyze(*given).stdout.splitlines()
    head, _, *rows = ([*map(str.strip, line.split("|"))] for line in lines if line.startswith("|"))
    kinds = {row[1]: row[head.index("K/V")] for row in rows}
    assert [kinds[layer] for layer in ("3", "4", "5")] == ["", "", "own"]


def test_a_plot_is_a_png_and_replaces_nothing(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "out.png"
    given = (model, "--text", text, "--plot", target)
    assert analyze(*given).exit_code == 0
    drawn = target.read_bytes()
    assert drawn.startswith(PNG)
    refused = analyze(*given)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert target.read_bytes() == drawn
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_plot_has_units_and_the_chosen_boundary(model, text, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda figure, file, **how: drawn.append(figure)
    )
    assert analyze(model, "--text", text, "--plot", tmp_path / "out.png").exit_code == 0
    [axes] = drawn[0].axes
    assert "times" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    limit, chosen = axes.get_legend_handles_labels()[1]
    assert limit == "balanced limit"
    boundary = chosen.removeprefix("balanced: boundary ").removesuffix(" (estimate)")
    assert boundary in [text.get_text() for text in axes.texts]


def test_a_plot_of_an_unknown_kind_fails_before_measuring(model):
    done = analyze(model, "--plot", "out.gif")
    assert done.exit_code == 1
    assert "out.png" in done.stderr


def test_a_plot_without_matplotlib_fails_before_measuring(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = analyze(model, "--plot", "out.png")
    assert done.exit_code == 1
    assert "[plot]" in done.stderr


# --- refusals


def test_without_torch_the_probes_still_run(model, text, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pop_local.research.")]:
        if name.endswith((".gates", ".decoder")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = analyze(model, "--text", text, "--json")
    assert done.exit_code == 0, done.output
    assert "pip install 'pop-local[analyze]'" in " ".join(done.stderr.split())
    found = json.loads(done.stdout)
    assert found["gates"] is None
    assert len(found["boundaries"]) == 3


def test_on_other_architectures_the_probes_still_run(tmp_path, text):
    pytest.importorskip("torch")
    other = make_gguf(tmp_path / "moe.gguf", "qwen3moe", n_layer=4)
    done = analyze(other, "--text", text, "--json")
    assert done.exit_code == 0, done.output
    assert "'qwen3moe'" in done.stderr
    assert len(json.loads(done.stdout)["boundaries"]) == 2


def test_too_little_memory_is_reported_with_a_remedy(model, text, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("pop_local.research.gates.needed_bytes", lambda *shape: 10**15)
    done = analyze(model, "--text", text)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "the gates need" in message
    assert "--context" in message
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--windows", "500"], "too short for 500 windows"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--plot", "nowhere/out.png"], "does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(model, text, options, reason):
    done = analyze(model, "--text", text, *options)
    assert done.exit_code == 1
    assert reason in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.parametrize(("context", "is_enough"), [(34, False), (35, True)])
def test_a_short_context_is_refused_before_loading(model, text, monkeypatch, context, is_enough):
    def load(*_: object, **options: object) -> NoReturn:
        raise PopError("loaded")

    monkeypatch.setattr("pop_local.research.layer_analysis.opened", load)
    done = analyze(model, "--text", text, "--context", context)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert ("loaded" in message) == is_enough
    assert ("context is too short" in message) != is_enough
    assert ("--context 35 or more" in message) != is_enough
    assert "--tail" not in message


@pytest.mark.parametrize("projection", ["own", "fitted"])
def test_a_converted_file_is_refused(tmp_path, projection):
    base = make_gguf(tmp_path / "base.gguf", "llama", n_layer=6)
    done = analyze(paired(base, tmp_path, projection, boundary=3).single)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "is already converted" in message
    assert "pop-local strip" in message


# --- boundaries


@pytest.mark.parametrize(("n_layer", "deepest"), [(2, 1), (3, 1), (18, 9), (30, 15)])
def test_the_deeper_half_is_probed(n_layer, deepest):
    found = boundaries(SimpleNamespace(n_layer=n_layer, n_deepstack=0))  # type: ignore[arg-type]
    assert (found[0], found[-1]) == (n_layer - 1, deepest)


def test_a_single_layer_has_nothing_to_skip():
    with pytest.raises(PlanError):
        boundaries(SimpleNamespace(n_layer=1))  # type: ignore[arg-type]


def test_what_a_layer_loses_is_counted_down_to_not_copying_at_all():
    found = [Estimate(value, 0.0) for value in (1.0, 0.9, 0.2, -0.5, -2.0)]
    assert layer_analysis.losses(found) == pytest.approx([0, 0.1, 0.7, 0.2, 0])
    assert layer_analysis.losses([None]) == [None]
