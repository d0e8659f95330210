"""Check the small real models' losses by pruning, and statistics of their layers."""

from functools import partial
from itertools import pairwise
from pydoc_data.topics import topics

import pytest

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure import probes
from pop_local.measure.budget import BALANCED, copies
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import Text, shipped_part, shipped_text, tokenize
from pop_local.measure.lookups import LookupSettings
from pop_local.measure.quality import QualitySettings, measure_against, read_reference
from pop_local.research import analyze as research
from pop_local.research.analyze import measure_copying, worth_measuring
from pop_local.workflows.conversion import convert_model
from support.calls import ignore
from support.conversion_runs import FEW, convert

pytestmark = pytest.mark.slow


def test_real_model_has_expected_losses(smollm2_q4_0, tmp_path, monkeypatch):
    """SmolLM2 loses its copying between boundaries 20 and 16, although prose hardly changes.

    At 20, a fit on eight windows recovers most of the loss.
    """
    monkeypatch.setattr(convert_model, "N_WINDOWS", 1)
    monkeypatch.setattr(convert_model, "N_DOCUMENTS", 1)
    few = partial(LookupSettings, n_per_document=4, n_tokens=256)
    monkeypatch.setattr(convert_model, "LookupSettings", few)
    short = partial(QualitySettings, n_context=256, n_continuation=64)
    monkeypatch.setattr(convert_model, "QualitySettings", short)
    monkeypatch.setattr(probes, "N_DRAWS", 1)
    model = PopModel(EngineOptions.of(smollm2_q4_0, n_ctx=512, n_threads=1))
    tokens = tokenize(model, Text("shipped", shipped_text().parts[2:3]))
    settings = QualitySettings(n_windows=1, n_context=256, n_continuation=64, n_draws=1)
    reference = read_reference(model, tokens, settings, ignore)
    third, half = (
        measure_against(reference, model, Pruning(boundary), ignore) for boundary in (20, 16)
    )
    assert 0.05 < third.kl_mean.value < 0.3
    assert third.copy_ppl_ratio.value < 1.5 < 3 < half.copy_ppl_ratio.value
    assert third.induction_retention is not None
    assert half.induction_retention is not None
    assert third.induction_retention.value > 0.7 > 0.2 > half.induction_retention.value
    assert half.kl_mean.value > BALANCED.max_kl
    assert not copies(half)
    text, target = tmp_path / "topics.txt", tmp_path / "fitted.gguf"
    text.write_text("\n".join(topics.values()))
    done = convert(smollm2_q4_0, target, "--text", text, "--boundary", 20, *FEW, "--tokens", 2048)
    assert done.exit_code == 0, done.stderr
    model = PopModel(EngineOptions.of(target, n_ctx=512, n_threads=1))
    fitted = measure_against(reference, model, Pruning(20), ignore)
    assert fitted.kl_mean.value < third.kl_mean.value / 2
    assert copies(fitted)


@pytest.mark.parametrize(
    ("name", "tried", "cliff"), [("smollm2", (18, 17, 16), {17}), ("gemma", (11, 10, 9), {10})]
)
def test_cliffs_of_real_models_are_found(request, monkeypatch, name, tried, cliff):
    path = request.getfixturevalue(name)
    monkeypatch.setattr(research, "boundaries", lambda shape: tried)
    opened = PopModel(EngineOptions.of(path, n_ctx=512, n_threads=1))
    tokens = tokenize(opened, Text("prose", (shipped_part("prose"),)))
    settings = QualitySettings(n_windows=1, n_context=64, n_continuation=8, n_draws=1)
    reference = read_reference(opened, tokens, settings, ignore)
    copying = measure_copying(opened, reference, ignore)
    kept = {result.boundary: result.retention.value for result in copying if result.retention}
    assert {deep for shallow, deep in pairwise(kept) if kept[shallow] - kept[deep] > 0.4} == cliff
    assert kept[tried[-1]] < 0.3
    # Down to the cliff's layer.
    assert min(entry.boundary for entry in worth_measuring(copying)) == min(cliff)


def test_torch_logits_of_a_real_model_equal_the_backends(smollm2):
    pytest.importorskip("torch")
    from support.decoders import backend_logits, mean_kl, torch_logits

    model = PopModel(EngineOptions.of(smollm2, n_ctx=128, n_threads=1))
    text = model.engine.context.vocabulary.tokenize(shipped_part("prose"))
    tokens = [*model.engine.context.vocabulary.bos, *text][:32]
    expected = backend_logits(model, tokens)
    assert mean_kl(expected, torch_logits(smollm2, tokens)) < 0.01
