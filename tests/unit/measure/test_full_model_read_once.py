"""References of the full model, read once, give the same figures as separate measurements."""

from dataclasses import replace

import pytest

from pop_base.errors import PopError
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning
from pop_local.measure.quality import (
    QualitySettings,
    measure_against,
    measure_pruning,
    read_reference,
)
from pop_local.research.analyze import measure_copying
from support.calls import ignore
from support.converted import paired
from support.synthetic import make_gguf

SETTINGS = QualitySettings(n_windows=2, n_context=64, n_continuation=8, n_draws=2)
TEXT = [[20 + number * 7 % 200 for number in range(200)]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    base = make_gguf(folder / "base.gguf", "llama", n_layer=6)
    return paired(base, folder, "fitted", boundary=3, min_prompt=0, tail_tokens=32)


@pytest.fixture(scope="module")
def reference(pair):
    model = PopModel(EngineOptions.of(pair.base, n_ctx=257, n_threads=1))
    return read_reference(model, TEXT, SETTINGS, ignore)


@pytest.mark.parametrize("form", ["base", "single", "sidecar"])
def test_figures_equal_those_of_a_separate_measurement(pair, reference, form):
    path, sidecar = {
        "base": (pair.base, None),
        "single": (pair.single, None),
        "sidecar": (pair.base, pair.sidecar),
    }[form]
    model = PopModel(EngineOptions.of(path, sidecar=sidecar, n_ctx=257, n_threads=1))
    quality = measure_against(reference, model, Pruning(3), ignore)
    whole = measure_pruning(model, TEXT, SETTINGS, Pruning(3), ignore)
    # A reference keeps its predictions in half precision.
    for name in ("kl_mean", "kl_median", "kl_p99", "kl_first"):
        assert getattr(quality, name).value == pytest.approx(getattr(whole, name).value, rel=1e-3)
        quality = replace(quality, **{name: getattr(whole, name)})
    assert quality == whole
    assert quality.kl_mean.value > 0


def test_progress_ends_at_its_total(pair, reference):
    seen: list[tuple[int, int]] = []
    model = PopModel(EngineOptions.of(pair.base, n_ctx=257, n_threads=1))
    read_reference(model, TEXT, SETTINGS, lambda *now: seen.append(now))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    seen.clear()
    measure_against(reference, model, Pruning(3), lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1]
    seen.clear()
    measure_copying(model, reference, lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1]


def test_text_that_is_too_short_is_refused(pair):
    model = PopModel(EngineOptions.of(pair.base, n_ctx=257, n_threads=1))
    with pytest.raises(PopError, match="too short for 2 windows"):
        read_reference(model, [[1, 2, 3]], SETTINGS, ignore)
