"""Online calibration of tiny random models, from learned sums to a sidecar in use."""

import gc
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pop_converter.base.errors import StoppedError
from pop_converter.gguf.header import read_header
from pop_converter.popfile.format import Budget, DeepRows
from pop_converter.popfile.sidecar import sidecar_meta, write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.carrier_windows import SHARE
from pop_local.cli import app
from pop_local.engine.learning import online_calibrator as learning
from pop_local.engine.learning.sums import SumsFile
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure import estimate
from pop_local.measure.lookups import LookupSettings
from pop_local.models.sidecars import is_learned, learned_files, sidecar_of
from pop_local.ui.chat import refill
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.workflows import learning as lessons_module
from pop_local.workflows.conversion import full_model
from pop_local.workflows.conversion.conversion_plan import RowOptions
from pop_local.workflows.learning import OnlineCalibration, _LookupSums
from support.calibrating import fitted_at, planned, settings, words
from support.calls import last_logits, never, opened, prompt, read, wait_for
from support.scripted_chat import Transcript
from support.serving import app_of, asking
from support.shapes import read_pop_meta
from support.synthetic import TEMPLATE, make_gguf

N = 512
ANY = Budget(
    "any",
    max_kl=1e9,
    max_ppl_ratio=1e9,
    max_copy_ratio=1e9,
    max_lost_lookups=1.0,
)
NONE = Budget(
    "none",
    max_kl=1e-9,
    max_ppl_ratio=0.5,
    max_copy_ratio=0.5,
    max_lost_lookups=0.0,
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(full_model, "N_DOCUMENTS", 1)
    few = partial(LookupSettings, n_per_document=1, n_tokens=256)
    monkeypatch.setattr(full_model, "LookupSettings", few)
    monkeypatch.setattr(estimate, "_N_BOOTSTRAP", 20)
    # Random tokens look like spelling, so nearly all of them would be deep rows.
    monkeypatch.setattr(RowOptions, "deep_rows", DeepRows.NONE)
    monkeypatch.setattr(lessons_module, "LEAST_WINDOWS", 1)
    monkeypatch.setattr(learning, "N_APART", 3)
    monkeypatch.setattr(learning, "SAVED_ROWS", 0)


@pytest.fixture
def plain(tmp_path):
    return make_gguf(tmp_path / "plain.gguf", "llama", chat_template=TEMPLATE)


def taught(path, budget=ANY, n_prompts=3, **options) -> Any:
    """Return a model that has read enough for a fit, and its online calibration."""
    model = opened(path, n_batch=N, n_ubatch=N, n_ctx=4 * N, **options)
    model.learn(1 << 30)
    lessons = OnlineCalibration(model, budget)
    for seed in range(n_prompts):
        read(model, prompt(3 * N, seed))
    return model, lessons


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3moe"])
def test_a_model_that_was_never_converted_prunes_after_some_prompts(arch, tmp_path):
    path = make_gguf(tmp_path / "plain.gguf", arch)
    model, lessons = taught(path)
    lesson = lessons.idle(never)
    assert lesson.boundary == model.engine.calibrator.boundaries[0] == 4
    assert lesson.speedup_limit > 1.2 and lesson.n_rows == model.engine.calibrator.n_rows
    before = last_logits(model)
    n_cached = model.engine.cache.n_tokens
    model.swap_sidecar(lesson.sidecar)
    assert (model.engine.pruning.mode, model.engine.pruning.boundary) == (Mode.CONTEXT, 4)
    # Rows that were read in full are exact, and stay.
    assert model.engine.cache.n_tokens == model.engine.cache.n_exact == n_cached
    assert model.read(Prompt(prompt(3 * N, 2))).n_cached == n_cached - 1
    np.testing.assert_allclose(last_logits(model), before, atol=0.01)
    found = model.read(Prompt(prompt(3 * N, 9)))
    assert found.counters.n_context > 1000
    meta: Any = sidecar_meta(read_header(lesson.sidecar))
    assert meta.calibration.n_tokens == lesson.n_rows
    assert meta.measured.kl_mean == pytest.approx(lessons.quality.kl_mean.value)


def test_the_next_start_uses_learned_statistics_and_adds_to_them(plain):
    model, lessons = taught(plain)
    lesson = lessons.idle(never)
    model.close()
    assert sidecar_of(model.engine.context.files.source) == lesson.sidecar
    assert read_pop_meta(plain) is None
    [files] = learned_files()
    assert files.sidecar == lesson.sidecar
    assert SumsFile.of(model.engine.context.files.source).known().n_rows[4] == lesson.n_rows
    again, lessons = taught(plain, sidecar=lesson.sidecar, keep_states=True, n_prompts=0)
    n_rows = again.engine.calibrator.n_rows
    assert not lessons.has_work
    for seed in range(3, 7):
        read(again, prompt(3 * N, seed))
        again.engine.refiller.refill()
    lessons.idle(never)
    assert again.engine.calibrator.n_rows > n_rows and lessons.quality is not None
    # The next sidecar may replace the one in use.
    lesson.sidecar.replace(lesson.sidecar.with_suffix(".old"))
    again.read(Prompt(prompt(600, 9)))
    again.close()
    assert CliRunner().invoke(app, ["learn", "forget", str(plain)]).exit_code == 0
    assert not learned_files() and sidecar_of(model.engine.context.files.source) is None
    assert "no statistics" in CliRunner().invoke(app, ["learn", "forget"]).stderr


def test_a_fit_over_few_rows_is_never_saved(plain, monkeypatch):
    """A sidecar reveals the rows that it was fitted to, just as sums do."""
    n_rows = 3 * 3 * N
    monkeypatch.setattr(learning, "SAVED_ROWS", 1000)
    model, lessons = taught(plain)
    source = model.engine.context.files.source
    first = lessons.idle(never)
    assert "Until the model is closed" in str(first)
    assert not learned_files() or not learned_files()[0].sidecar.exists()
    assert not is_learned(first.sidecar) and first.sidecar.parent.stat().st_mode & 0o077 == 0
    model.swap_sidecar(first.sidecar)
    model.engine.set_mode(Mode.OFF)
    assert sidecar_of(source) is None and not lessons.has_work
    # Once the sums cover enough rows, a fit to these sums is saved, even if it is no better.
    monkeypatch.setattr(learning, "SAVED_ROWS", n_rows // 1000)
    monkeypatch.setattr(OnlineCalibration, "_is_better", lambda *_: False)
    read(model, prompt(3 * N, 3))
    second = lessons.idle(never)
    assert sidecar_of(source) == second.sidecar and "From now on" in str(second)
    saved = model.engine.calibrator.file.load().grams[second.boundary]
    assert second.n_rows == saved.n_rows
    # Later rows are not added to a fit until they are saved, too.
    monkeypatch.setattr(learning, "SAVED_ROWS", 1000)
    read(model, prompt(3 * N, 4))
    assert lessons.idle(never) is None
    assert model.engine.calibrator.sums().grams[second.boundary].n_rows == saved.n_rows
    model.close()
    folder = first.sidecar.parent
    del lessons
    gc.collect()
    assert not folder.exists()


def test_learned_fits_use_look_ups(plain, monkeypatch):
    windows = np.array([prompt(N, seed) for seed in range(50, 54)], np.int32)
    asked: list[int] = []

    def carriers(context, n):
        asked.append(n)
        return windows[: max(n, 2)]

    monkeypatch.setattr(lessons_module, "own_carriers", carriers)
    model, lessons = taught(plain)
    learner, runner = model.engine.calibrator, lessons._runner
    learner.work(never)
    learned = learner.sums()
    whole = _LookupSums(learner.sums()).add(learner, runner)
    assert asked == [-(-learner.n_wanted // ((SHARE - 1) * N))]
    for boundary, gram in whole.grams.items():
        before = learned.grams[boundary]
        assert gram.n_rows == before.n_rows
        # The last input is constant, so this element is the sum of the row weights.
        share = 1 - before.xx[-1, -1] / gram.xx[-1, -1]
        assert 0.15 < share < 0.35, share
    # A stop keeps the windows that were added.
    steps, stopped = count(1), _LookupSums(learner.sums())
    lessons._should_stop = lambda: stopped.n_done == 1 and next(steps) > 1
    with pytest.raises(StoppedError):
        stopped.add(learner, runner)
    assert stopped.n_done == 1
    lessons._should_stop = never
    resumed = stopped.add(learner, runner)
    for boundary, gram in whole.grams.items():
        np.testing.assert_array_equal(resumed.grams[boundary].xx, gram.xx)


def test_the_users_settings_stay(plain):
    model, lessons = taught(plain)
    model.swap_sidecar(lessons.idle(never).sidecar)
    model.engine.set_mode(Mode.OFF)
    model.engine.prompter.parse_special = True
    model.swap_sidecar(model.engine.context.files.sidecar)
    assert (
        model.engine.pruning.mode is Mode.OFF
        and not model.engine.refiller.is_on
        and model.engine.prompter.parse_special
    )


def test_deleted_statistics_restart_learning(plain):
    model, lessons = taught(plain)
    model.engine.calibrator.work(never)
    model.engine.calibrator.save()
    for files in learned_files():
        files.forget()
    assert lessons.idle(never) is None
    read(model, prompt(3 * N, 8))
    assert lessons.idle(never) is None


def test_a_fit_outside_the_budget_is_not_used(plain):
    model, lessons = taught(plain, NONE)
    assert lessons.idle(never) is None
    assert not lessons.has_work  # until more prompts are read
    assert sidecar_of(model.engine.context.files.source) is None


def test_work_that_is_stopped_at_any_time_continues(plain):
    model, lessons = taught(plain)
    stops = 0
    for patience in (int(5 * 1.5**n) for n in count()):
        asked = count(1)
        lesson = lessons.idle(lambda: next(asked) >= patience)  # noqa: B023
        if lesson:
            break
        stops += 1
        assert sidecar_of(model.engine.context.files.source) is None
    assert stops > 5 and lesson.boundary == 4


def test_a_later_fit_must_be_better(plain, monkeypatch):
    model, lessons = taught(plain)
    model.swap_sidecar(lessons.idle(never).sidecar)
    assert not lessons.has_work
    model.engine.set_mode(Mode.OFF)
    model.swap_sidecar(model.engine.context.files.sidecar)
    # The user's full mode stays.
    assert model.engine.pruning.mode is Mode.OFF and not model.engine.refiller.is_on
    for seed in range(3, 6):
        read(model, prompt(3 * N, seed))
    assert lessons.has_work
    better = lessons.idle(never)
    # More random text may or may not improve the fit.
    assert better is None or better.boundary == 4
    assert lessons.quality.n_windows > 1


@pytest.mark.parametrize("kind", [Projection.FITTED, Projection.WIDE])
def test_a_fit_in_use_adapts_to_new_prompts(plain, kind, tmp_path):
    [made] = fitted_at((5,), plain, settings(words(tmp_path)), projections=(kind,))
    # This bias is wrong for all text.
    worse = [
        replace(each, data=np.full(each.dims, 3.0, np.float32).tobytes())
        if each.name.endswith(".bias")
        else each
        for each in made.tensors
    ]
    made, sidecar = replace(made, tensors=tuple(worse)), tmp_path / "fitted.pop-sidecar.gguf"
    write_sidecar(planned(plain, 5, kind), plain, sidecar, fitted=made)
    model, lessons = taught(plain, sidecar=sidecar, keep_states=True, n_prompts=0)
    for seed in range(3):
        read(model, prompt(3 * N, seed))
        model.engine.refiller.refill()
    lesson = lessons.idle(never)
    assert model.engine.calibrator.boundaries == (5,)
    assert lesson.boundary == 5
    model.swap_sidecar(lesson.sidecar)
    assert model.engine.context.files.meta.projection == kind
    model.close()
    if kind != Projection.FITTED:
        return
    # The next start adds to the same sums.
    n_rows = model.engine.calibrator.n_rows
    again, lessons = taught(plain, sidecar=sidecar, keep_states=True, n_prompts=0)
    for seed in range(3, 6):
        read(again, prompt(3 * N, seed))
        again.engine.refiller.refill()
    again.engine.calibrator.work(never)
    again.engine.calibrator.save()
    assert again.engine.calibrator.file.known().n_rows[5] > 1.5 * n_rows
    lessons.idle(never)


def test_a_chat_reports_a_learned_fit(plain):
    model, lessons = taught(plain)
    screen = Transcript()
    sampling = {"temperature": 0.0, "max_tokens": 4}
    chat = Dialogue(
        model, lambda *_: model, screen, sampling=sampling, make_fitter=lambda _: lessons
    )
    with refill.idling(chat):
        wait_for(lambda: not lessons.has_work)
    assert "# Learned from" in screen.shown and "From now on, pop-local reads" in screen.shown
    assert "times as fast. To read prompts in full, type /full on." in screen.shown
    chat.ask("a b c d " * 300)
    assert chat.session.answer_stats[-1].n_pruned > 0


def test_a_server_reports_the_fit_of_a_prompt(plain):
    model, lessons = taught(plain)
    with asking(app_of(model, "tiny", fitter=lessons)) as client:
        wait_for(lambda: model.engine.pruning.boundary)
        body = {"prompt": "a b c d " * 300, "max_tokens": 2}
        used = client.post("/v1/completions", json=body).json()["usage"]["pop"]
    assert used["n_pruned"] > 0
    assert used["fit"].startswith("prompts from this machine")
