"""always-skip, the baseline of `eval`: every token skips the layers, and that is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pop_converter.base.errors import PopError
from pop_local.cli import app
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure import probes
from pop_local.measure.forced import Pruning, always_skip, forced
from pop_local.measure.quality import Quality, QualitySettings, measure_prunings
from support.converted import paired, tiny
from support.synthetic import make_gguf

N_CONTEXT, N_CONTINUATION = 60, 20
WINDOWS = ("--windows", 2, "--context", N_CONTEXT, "--continuation", N_CONTINUATION)
BASELINE = ("--baseline", "always-skip")


@pytest.fixture(autouse=True)
def random_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "N_DRAWS", 1)


def opened(path: Path) -> PopModel:
    return PopModel(path, n_ctx=512, n_threads=1)


def random_text(n_tokens: int) -> list[int]:
    return np.random.default_rng(0).integers(3, 384, n_tokens).tolist()


def measured(model: PopModel, *prunings: Pruning) -> tuple[Quality, ...]:
    settings = QualitySettings(2, N_CONTEXT, N_CONTINUATION)
    return measure_prunings(model, [random_text(300)], settings, prunings, lambda *_: None)


def evaluate(*arguments: object):
    given = [*arguments, *WINDOWS, "--recall", 0, "--threads", 1]
    return CliRunner().invoke(app, ["eval", *map(str, given)])


def report(*arguments: object) -> dict:
    done = evaluate(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# --- what is measured


def test_it_is_the_model_without_its_deep_layers(pop_file, tmp_path):
    """Layers that add nothing can be left out for every token; others cannot."""
    idle = opened(tiny(tmp_path, zero_deep=4))
    assert measured(idle, always_skip(4))[0].kl_mean.value < 1e-4
    assert measured(opened(pop_file), always_skip(4))[0].kl_mean.value > 1e-2


def test_every_token_is_pruned_in_context_and_continuation(pop_file):
    pop, baseline = measured(opened(pop_file), Pruning(4, Mode.CONTEXT), always_skip(4))
    assert (pop.n_pruned, pop.n_pruned_continuation) == (2 * (N_CONTEXT - 17), 0)
    assert baseline.n_pruned == 2 * N_CONTEXT
    assert baseline.n_pruned_continuation == 2 * (N_CONTINUATION - 1)


def test_prunings_in_one_run_are_those_of_single_runs(pop_file):
    model = opened(pop_file)
    prunings = (always_skip(2), Pruning(4, Mode.CONTEXT), always_skip(6))
    together = measured(model, *prunings)
    assert [measured(model, pruning)[0] for pruning in prunings] == list(together)


def test_fitted_projections_make_no_difference_to_it(tmp_path):
    """Nothing attends in the skipped layers."""
    base = make_gguf(tmp_path / "base.gguf", "llama")
    (tmp_path / "own").mkdir()
    files = paired(base, tmp_path, "fitted", boundary=4)
    own = paired(base, tmp_path / "own", "own", boundary=4)
    pop, baseline = measured(opened(files.single), Pruning(4, Mode.CONTEXT), always_skip(4))
    own_pop, own_baseline = measured(opened(own.single), Pruning(4, Mode.CONTEXT), always_skip(4))
    assert baseline == own_baseline
    assert pop != own_pop


@pytest.mark.parametrize(("started", "mode"), [(Mode.OFF, Mode.ALWAYS), (Mode.ALWAYS, Mode.OFF)])
def test_a_continuation_that_was_not_pruned_as_planned_is_an_error(
    pop_file, monkeypatch, started, mode
):
    n_pruned = 19 if mode is Mode.ALWAYS else 0
    with forced(opened(pop_file)) as reader:
        reader.read(random_text(60), Pruning(4, started))
        with monkeypatch.context() as patch:
            patch.setattr(backend, "set_mode", lambda ctx, mode: None)
            with pytest.raises(PopError, match=f"of 19 continuation tokens {n_pruned} should"):
                reader.predict(random_text(20), Pruning(4, started, mode))


# --- eval --baseline


def test_json_has_the_baseline_beside_the_figures_of_pop(pop_file, text):
    plain = report(pop_file, "--text", text)
    both = report(pop_file, "--text", text, *BASELINE)
    baseline = both.pop("baseline")
    assert plain.pop("baseline") is None
    assert both == plain
    assert baseline.pop("name") == "always-skip"
    assert set(baseline) < set(plain)
    assert {"kl_mean", "kl_se", "kl_first", "ppl_ratio", "copy_ppl_ratio"} < set(baseline)
    assert (baseline["boundary"], baseline["n_pruned"]) == (4, 2 * N_CONTEXT)
    assert baseline["n_pruned_continuation"] == 2 * (N_CONTINUATION - 1)


def test_each_depth_of_a_sweep_has_its_own(pop_file, text):
    rows = report(pop_file, "--text", text, *BASELINE, "--sweep", "2,6")["rows"]
    assert [row["boundary"] for row in rows] == [6, 2]
    assert [row["baseline"]["boundary"] for row in rows] == [6, 2]
    assert rows[0]["baseline"]["kl_mean"] < rows[1]["baseline"]["kl_mean"]


def test_people_get_both_below_each_other(pop_file, text):
    done = evaluate(pop_file, "--text", text, *BASELINE)
    kinds = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert kinds[2:] == ["own", "always-skip"]


def test_it_is_compared_with_pop_only(pop_file):
    assert evaluate(pop_file, *BASELINE, "--no-boundary").exit_code == 2


def test_another_baseline_is_wrong_usage(pop_file):
    assert evaluate(pop_file, "--baseline", "never-skip").exit_code == 2
