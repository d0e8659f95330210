"""Test `convert --distill`: the tried candidates, refusals, failures."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pop_local
from pop_base.errors import PopError
from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.projection import Projection
from pop_local.calibration import fit_options, needs, texts
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.measure.budget import BALANCED
from pop_local.measure.estimate import Estimate
from pop_local.measure.quality import measure_against
from pop_local.research.distilled import Distiller
from pop_local.workflows.conversion import search as searching
from pop_local.workflows.conversion.conversion_plan import ConvertOptions
from pop_local.workflows.conversion.search import Candidate
from support.conversion_runs import FEW, LOOSE, convert
from support.converted import names
from support.shapes import read_pop_meta
from support.synthetic import make_gguf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_search")]

FIT = ("--projection", "fitted", "--distill", *FEW)


def followed(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Distil on six windows, and record the boundaries of each reading and each training."""
    pytest.importorskip("torch")
    read: list[int] = []
    trained: list[int] = []

    def noted_read(self, first, *args, real=Distiller.read):
        read.append(first)
        return real(self, first, *args)

    def noted_trained(self, plan, *args, real=Distiller.trained):
        trained.append(plan.boundary)
        return real(self, plan, *args)

    monkeypatch.setattr(Distiller, "read", noted_read)
    monkeypatch.setattr(Distiller, "trained", noted_trained)
    monkeypatch.setattr(fit_options, "N_DISTILLED", 6)
    return read, trained


def test_tries_distilled_fits_from_fastest_candidate(tiny, letters, tmp_path, monkeypatch):
    """Set the losses, since the training has too little text for meaningful losses."""
    read, trained = followed(monkeypatch)

    def scripted(*arguments):
        found = measure_against(*arguments)
        deepest = 3 if found.boundary in trained else 5
        good = Estimate(1.0 if found.boundary >= deepest else 1.5, 0.0)
        kl = Estimate(0.001, 1e-4)
        return replace(found, kl_mean=kl, ppl_ratio=good, copy_ppl_ratio=good)

    monkeypatch.setattr(searching, "measure_against", scripted)
    done = convert(tiny, "--sidecar", *FIT, "--text", letters, "--json")
    assert done.exit_code == 0, done.stderr
    meta = read_pop_meta(tmp_path / "tiny.pop-sidecar.gguf")
    assert meta is not None and meta.budget is not None and meta.calibration is not None
    assert trained == [5, 4, 3, 2]
    assert read == trained
    assert (meta.boundary, meta.calibration.n_distilled) == (3, 6 * texts.N_WINDOW)
    assert meta.budget.tried.endswith(
        "4 distilled (names) inside, 3 distilled (names) inside, 2 distilled (names) outside"
    )
    report = json.loads(done.stdout)
    assert report["distilled"] is True
    assert [trial["distilled"] for trial in report["tried"][-5:]] == [False, *[True] * 4]


def test_distills_named_boundary_if_plain_fit_exceeds_budget(tiny, letters, tmp_path, monkeypatch):
    read, trained = followed(monkeypatch)

    def scripted(*arguments):
        copy = Estimate(1.0 if trained else 2000.0, 0.0)
        return replace(measure_against(*arguments), copy_ppl_ratio=copy)

    monkeypatch.setattr(searching, "measure_against", scripted)
    done = convert(tiny, *FIT, "--text", letters, "--boundary", 4, *LOOSE)
    assert done.exit_code == 0, done.stderr
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.budget is not None
    assert (meta.boundary, meta.budget.tried) == (
        4,
        "4 (names) outside, 4 distilled (names) inside",
    )
    assert read == [4]


@pytest.mark.parametrize(("more", "is_taken"), [(-0.001, True), (0.0004, True), (0.001, False)])
def test_prefers_distilled_fit_unless_kl_is_larger(more, is_taken, tiny):
    """Let windows differ from each other more than the two fits differ on one window."""
    given: Any = {"projection": Projection.FITTED, "macs": GraphMacs(tiny)}
    plan = make_plan(source_shape(read_source(tiny)), boundary=4, **given)
    unused: Any = SimpleNamespace()
    search = searching.Search(unused, BALANCED, unused, unused, [plan])
    plain, distilled = Candidate(plan), Candidate(replace(plan, is_distilled=True))
    search.plain, search.distilled = [plain], [distilled]
    windows = np.array([0.002, 0.01, 0.02, 0.04])
    changes = more + np.array([-0.001, 0.001, 0.001, -0.001])
    for candidate, kls in ((plain, windows), (distilled, windows + changes)):
        scores: Any = [SimpleNamespace(divergence=SimpleNamespace(kl=kl)) for kl in kls[:, None]]
        quality: Any = SimpleNamespace(kl_mean=Estimate(kls.mean(), 0.008))
        candidate.scores, candidate.measured, candidate.lookups = scores, quality, unused
        candidate.is_inside = True
    assert search.fastest() is (distilled if is_taken else plain)


@pytest.mark.parametrize(
    ("arch", "options", "reason"),
    [
        ("llama", ("--boundary", 7), "only one layer is skipped"),
        ("phi3", (), "the architecture 'phi3'"),
    ],
)
def test_rejects_impossible_distilling_before_measuring(arch, options, reason, tmp_path):
    tiny = make_gguf(tmp_path / "tiny.gguf", arch)
    done = convert(tiny, "--distill", *options)
    assert done.exit_code == 1
    assert reason in done.stderr and "remove --distill" in done.stderr
    assert names(tmp_path) == {"tiny.gguf"}


def test_own_projections_cannot_be_distilled(tiny):
    with pytest.raises(PopError, match="own projections cannot be distilled"):
        options = ConvertOptions(pop_local.Boundary(5), None, distiller=Distiller)
        pop_local.convert(tiny, options=options)


def test_distilling_requires_memory(tiny, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(needs, "free_bytes", lambda: 10**6)
    done = convert(tiny, "--distill")
    assert done.exit_code == 1
    assert "distilling the fit needs" in done.stderr
    assert "close other programs or remove --distill" in " ".join(done.stderr.split())


def test_distilling_requires_torch(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = convert(tiny, "--distill")
    assert done.exit_code == 1
    assert "pip install 'pop-local[distill]'" in " ".join(done.stderr.split())
    assert convert(tiny, "--distill", "--projection", "own").exit_code == 2


def test_failed_distilling_keeps_plain_fit(tiny, letters, tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def fail(*args):
        raise PopError("no memory is left")

    monkeypatch.setattr(Distiller, "read", fail)
    done = convert(tiny, "--sidecar", *FIT, *LOOSE, "--text", letters, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["distilled"] is False
    assert "Skipping boundary 2 distilled (names): no memory is left" in done.stderr
    meta = read_pop_meta(tmp_path / "tiny.pop-sidecar.gguf")
    assert meta is not None and meta.budget is not None and meta.calibration is not None
    assert (meta.boundary, meta.calibration.n_distilled) == (2, 0)
    assert "distilled" not in meta.budget.tried
