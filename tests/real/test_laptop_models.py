"""Test the catalog's larger models if present: `pop-local pull qwen-0.5b --dir models`."""

import pytest

from pop_converter.gguf.source import read_source
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import LookupSettings, measure_lookups
from pop_local.measure.quality import QualitySettings, measure_pruning
from pop_local.models.model_names import find
from pop_local.models.sidecars import sidecar_of
from support.paths import MODELS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["qwen-0.5b", "qwen-1.5b"])
def test_shipped_sidecar_has_its_measured_quality(name):
    path = MODELS / find(name).file
    if not path.is_file():
        pytest.skip(f"{path.name} is not in models/")
    sidecar = sidecar_of(read_source(path))
    with PopModel(EngineOptions.of(path, sidecar=sidecar, n_ctx=1280, n_threads=1)) as model:
        meta = model.engine.context.files.meta
        assert meta is not None and meta.measured is not None
        pruning, settings = Pruning(meta.boundary), QualitySettings(4)
        text = tokenize(model, shipped_text())
        quality = measure_pruning(model, text, settings, pruning, lambda *_: None)
        lookups = measure_lookups(model, LookupSettings(2), pruning, lambda *_: None)
    assert quality.n_pruned > 1500
    # The sidecar was measured on sixteen windows; this test uses four.
    assert abs(quality.kl_mean.value - meta.measured.kl_mean) < 3 * (quality.kl_mean.se or 0)
    assert abs(quality.ppl_ratio.value - meta.measured.ppl_ratio) < 3 * (quality.ppl_ratio.se or 0)
    assert lookups.full >= 0.9 * lookups.n and lookups.pruned > lookups.n / 2
