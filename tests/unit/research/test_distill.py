"""Distilling: what it computes is what the backend prunes, and it brings that nearer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.fit import least_squares as fit
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import DistillText
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import divergence, predictions
from pop_local.measure.forced import FULL, Pruning, forced
from pop_local.research.distilled import Distiller, computing, start_of
from pop_local.workflows.hardware import Hardware
from support.calibrating import BOUNDARY, fitted, planned, prompt, settings
from support.synthetic import make_gguf

torch = pytest.importorskip("torch")
from pop_local.research import distill as distilling  # noqa: E402
from pop_local.research.decoder import Decoder  # noqa: E402

torch.set_num_threads(1)

FITTED, WIDE = Projection.FITTED, Projection.WIDE

N_TOKENS, N_CONTEXT, N_SINK = 96, 64, 2


def nothing(done: int, total: int) -> None: ...


def started(path: Path, fit_result: Fitted) -> distilling.InitialFit:
    return start_of(pruned_plan(path, fit_result), read_source(path), fit_result)


def pruned_plan(path: Path, fit_result: Fitted) -> Plan:
    """A plan as distilling prunes: without a tail."""
    return replace(
        planned(path, projection=fit_result.projection),
        sink_tokens=N_SINK,
        tail_tokens=0,
        min_prompt=0,
    )


def backend_kl(path: Path, fit_result: Fitted, windows: np.ndarray, folder: Path) -> np.ndarray:
    """KL(full || pruned) of the answers' rows [n_windows, n_answer], by llama.cpp."""
    sidecar = folder / "m.pop-sidecar.gguf"
    write_sidecar(pruned_plan(path, fit_result), path, sidecar, fitted=fit_result, force=True)
    results = []
    with (
        PopModel(
            EngineOptions.of(path, sidecar=sidecar, n_ctx=256, n_threads=1, n_gpu_layers=0)
        ) as model,
        forced(model) as reader,
    ):
        for window in windows.tolist():
            both = []
            for pruning in (FULL, Pruning(BOUNDARY)):
                reader.read(window[:N_CONTEXT], pruning)
                both.append(predictions(reader.predict(window[N_CONTEXT:])))
            results.append(divergence(*both).kl)
    return np.stack(results)


def evenly(windows):
    """Windows whose rows all count the same."""
    return DistillText(windows, np.ones(windows.shape, np.float32))


@pytest.mark.parametrize(
    ("arch", "kind", "matrices", "tolerance"),
    [
        ("llama", WIDE, None, 2e-4),
        ("qwen2", WIDE, None, 2e-4),
        ("gemma3", FITTED, None, 2e-4),
        ("gemma3", WIDE, None, 2e-4),
        ("qwen3", FITTED, torch.bfloat16, 1e-3),
    ],
)
def test_loss_equals_the_backends_divergence(arch, kind, matrices, tolerance, letters, tmp_path):
    path = make_gguf(tmp_path / "m.gguf", arch)
    result = fitted(path, settings(letters), projection=kind)
    windows = np.array([prompt(N_TOKENS, seed) for seed in range(3)], np.int32)
    decoder, start = Decoder(read_source(path), matrices=matrices), started(path, result)
    reference = distilling.read(decoder, BOUNDARY, evenly(windows), seed=0, on_progress=nothing)
    states = reference.states.clone()
    student = distilling._Student(decoder, start, reference, lambda n: None)
    assert torch.equal(reference.states, states), "each step needs them"
    with torch.no_grad():
        # The context's last row asks for logits, so it is a full one.
        computed = student.kl([0, 1, 2], N_CONTEXT - 1).numpy()
    expected = backend_kl(path, result, windows, tmp_path)
    np.testing.assert_allclose(computed[:, :-1], expected, rtol=0.1, atol=tolerance)
    assert expected.mean() > 1e-3
    for layer, kept in student.trained().items():
        np.testing.assert_allclose(kept.bias, start.projections[layer].bias, atol=1e-4)


def test_distilling_lowers_the_loss_on_other_text(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "_PASSAGE", (8, 24))
    path = make_gguf(tmp_path / "m.gguf", "llama")
    result = fitted(path, settings(letters), projection=WIDE)
    windows = np.array([prompt(N_TOKENS, seed) for seed in range(60)], np.int32)
    others = np.array([prompt(N_TOKENS, seed) for seed in range(200, 204)], np.int32)
    counted: list[tuple[int, int]] = []
    watch = Watch(on_progress=lambda *each: counted.append(each))
    options = FitOptions(kv_type=fit.KvType.F32)
    distiller = Distiller(read_source(path), options, Hardware(), watch)
    reference = distiller.read(BOUNDARY, evenly(windows), torch.float32)
    assert counted[0][0] == 0 and counted[-1][0] == counted[-1][1]
    counted.clear()
    distilled = distiller.trained(pruned_plan(path, result), result, reference, torch.float32)
    assert [done for done, _ in counted[:3]] == [0, 1, 2], "a stop is asked for with each input"
    assert counted[-1][0] == counted[-1][1]
    assert distilled.calibration.n_distilled == windows.size
    assert [tensor.name for tensor in distilled.tensors[:3]] == [
        tensor.name for tensor in result.tensors[:3]
    ]
    assert len(distilled.tensors) == len(result.tensors)
    before, after = (backend_kl(path, each, others, tmp_path) for each in (result, distilled))
    assert after.mean() < 0.85 * before.mean(), (before.mean(), after.mean())


def test_non_finite_fit_is_refused(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "_units", lambda rows, weights: weights * float("nan"))
    path = make_gguf(tmp_path / "m.gguf", "llama")
    result = fitted(path, settings(letters))
    windows = np.array([prompt(N_TOKENS, seed) for seed in range(2)], np.int32)
    decoder, start = Decoder(read_source(path)), started(path, result)
    reference = distilling.read(decoder, BOUNDARY, evenly(windows), seed=0, on_progress=nothing)
    with pytest.raises(fit.FitError, match="for layer 5 contains NaN"):
        distilling.distill(decoder, start, reference, seed=0, on_progress=nothing)


def test_one_window_with_more_sinks_than_rows_is_enough(letters, tmp_path):
    path = make_gguf(tmp_path / "m.gguf", "llama")
    result = fitted(path, settings(letters))
    windows = np.array([prompt(N_TOKENS, 0)], np.int32)
    decoder = Decoder(read_source(path))
    start = replace(started(path, result), n_sink=1000)
    reference = distilling.read(decoder, BOUNDARY, evenly(windows), seed=0, on_progress=nothing)
    trained = distilling.distill(decoder, start, reference, seed=0, on_progress=nothing)
    assert set(trained) == set(start.projections)


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (MemoryError(), PopError),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), PopError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), PopError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_missing_memory_is_a_short_error(raised, error):
    with pytest.raises(error), computing("distilling", "close others", cause="no-memory"):
        raise raised
