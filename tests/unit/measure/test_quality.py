"""Quality: teacher forcing, proof by the counters, figures of tiny models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.slot import Slot
from pop_local.engine.model import PopModel
from pop_local.measure.forced import FULL, Pruning, forced
from pop_local.measure.probes import pick_passage, random_tokens
from pop_local.measure.quality import (
    Quality,
    QualitySettings,
    measure_against,
    measure_pruning,
    read_reference,
)
from support.calls import first_of, ignore, set_rule
from support.converted import tiny
from support.synthetic import make_gguf

SHORT = QualitySettings(n_windows=3, n_context=60, n_continuation=20, n_draws=1)
N_VOCAB = 384


@pytest.fixture
def model(pop_file) -> PopModel:
    return opened(pop_file)


def opened(path: Path) -> PopModel:
    return PopModel(EngineOptions.of(path, n_ctx=512, n_threads=1))


def text(n_tokens: int = 400, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n_tokens).tolist()


def measured(model: PopModel, settings: QualitySettings = SHORT) -> Quality:
    """Measure the loss at the model's own boundary."""
    pruning = Pruning(first_of(model).settings.boundary)
    return measure_pruning(model, [text()], settings, pruning, ignore)


# --- reading


def test_predictions_equal_those_of_one_full_pass(model):
    tokens = text(90)
    with forced(model) as reader:
        reader.read(tokens[:60], FULL)
        predicted = reader.predict(tokens[60:])
        again = reader.predict(tokens[60:])
        reader.read(tokens[:30], FULL)
        longer = reader.predict(tokens[30:])
    np.testing.assert_array_equal(predicted, again)
    np.testing.assert_allclose(longer[30:], predicted, atol=0.02)
    assert abs(predicted - np.roll(predicted, 1, axis=0)).max() > 1


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_measuring_restores_the_model(model, mode):
    model.engine.set_mode(mode)
    before = first_of(model).settings.boundary
    measure_pruning(model, [text()], SHORT, Pruning(2), ignore)
    assert first_of(model).settings.boundary == before
    assert first_of(model).settings.mode is backend.get_mode(model.engine.context.ctx) is mode
    assert first_of(model).cache.n_tokens == 0


def test_measuring_restores_a_model_without_keys(tmp_path):
    model = opened(make_gguf(tmp_path / "plain.gguf", "llama"))
    quality = measure_pruning(model, [text()], SHORT, Pruning(4), ignore)
    assert quality.n_pruned > 0
    assert (first_of(model).settings.boundary, first_of(model).settings.mode) == (0, Mode.OFF)


def test_rows_pruned_against_the_plan_are_an_error(model, monkeypatch):
    monkeypatch.setattr(backend, "get_counters", lambda ctx: Counters(0, 60))
    with (
        forced(model) as reader,
        pytest.raises(PopError, match="should have pruned 43 of 60 context tokens"),
    ):
        reader.read(text(60), Pruning(4, Mode.CONTEXT))


def test_continuation_with_pruned_rows_is_an_error(model, monkeypatch):
    real = backend.set_mode
    with forced(model) as reader:
        reader.read(text(60), Pruning(4))
        monkeypatch.setattr(backend, "set_mode", lambda ctx, mode: real(ctx, Mode.ALWAYS))
        with pytest.raises(PopError, match="should have pruned 0 of 19 continuation tokens"):
            reader.predict(text(20))


def test_recurrent_state_that_cannot_be_restored_is_an_error(model, monkeypatch):
    monkeypatch.setattr(Context, "is_recurrent", property(lambda _: True))
    monkeypatch.setattr(Slot, "restore", lambda *_: False)
    with forced(model) as reader, pytest.raises(PopError, match="the saved state does not match"):
        reader.read(text(60), FULL)
        reader.predict(text(20))


def test_should_stop_aborts_a_measurement_between_graph_nodes(model):
    n_asked = 0

    def should_stop() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked >= 3

    with stopped_by(should_stop), pytest.raises(StoppedError):
        measured(model)
    assert n_asked == 3, "the first batch is aborted"
    assert (first_of(model).cache.n_tokens, first_of(model).settings.mode) == (0, Mode.CONTEXT)
    assert measured(model).n_pruned > 0


@pytest.mark.parametrize(
    ("rule", "n_pruned"),
    [
        ({}, 60 - 17),
        ({"tail_tokens": 0}, 60 - 2),
        ({"tail_tokens": 4, "sink_tokens": 0}, 60 - 4),
        ({"min_prompt": 1000}, 60 - 17),
    ],
)
def test_rule_decides_which_tokens_are_pruned(model, rule, n_pruned):
    set_rule(model, **rule)
    assert measured(model).n_pruned == 3 * n_pruned


def test_context_of_full_tokens_only_is_an_error(model):
    with pytest.raises(PopError, match="tokens is too short"):
        measured(model, replace(SHORT, n_context=17))


# --- measuring


def test_full_against_full_is_zero(model):
    quality = measure_pruning(model, [text()], SHORT, FULL, ignore)
    assert quality.n_pruned == 0
    assert quality.kl_p99.value < 1e-9
    assert quality.ppl_ratio.value == quality.copy_ppl_ratio.value == 1
    assert quality.top1_agreement.value == 1
    assert quality.induction_delta_nll.value == 0


def test_skipping_layers_that_add_nothing_loses_nothing(model, tmp_path):
    idle = opened(tiny(tmp_path, zero_deep=4))
    assert measured(idle).kl_mean.value < 1e-4
    assert measured(model).kl_mean.value > 1e-2


def test_boundaries_in_one_run_equal_those_of_single_runs(model):
    both = [measure_pruning(model, [text()], SHORT, Pruning(at), ignore) for at in (6, 2)]
    model.engine.sequences[0].set_boundary(2)
    assert measured(model) == both[1]
    assert both[0].kl_mean.value < both[1].kl_mean.value


def test_passages_are_pruned_tokens(model):
    context = list(range(100))
    rule = first_of(model).rule
    picked = {
        tuple(pick_passage(context, 20, rule, np.random.default_rng(seed))) for seed in range(200)
    }
    assert min(min(p) for p in picked) == 1
    assert max(max(p) for p in picked) == 83
    assert all(p == tuple(range(p[0], p[0] + 20)) for p in picked)


@pytest.mark.parametrize("tail", [126, 127, 200])
def test_random_tokens_are_scored_even_if_all_are_full(model, tail):
    set_rule(model, tail_tokens=tail)
    quality = measured(model, replace(SHORT, n_windows=1, n_context=260))
    assert quality.n_pruned > 0
    assert np.isfinite(quality.induction_delta_nll.value)
    if tail > 127:
        assert quality.induction_delta_nll.value == pytest.approx(0, abs=1e-5)


def test_random_tokens_exclude_control_tokens(model):
    tokens = random_tokens(model, 2000, np.random.default_rng(0))
    vocab = model.engine.context.vocabulary.pointer
    attribute = backend.bindings().llama_vocab_get_attr
    assert {attribute(vocab, token) & 8 for token in tokens} == {0}  # LLAMA_TOKEN_ATTR_CONTROL


def test_reference_takes_half_the_memory_with_the_same_figures(model):
    reference = read_reference(model, [text()], SHORT, ignore)
    assert {full.predicted.logits.dtype for full in reference.full} == {np.dtype(np.float16)}
    quality = measure_against(reference, model, FULL, ignore)
    assert quality.kl_p99.value < 1e-5
    assert quality.ppl_ratio.value == quality.top1_agreement.value == 1
