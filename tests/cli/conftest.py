"""Fixtures for tests of commands: tiny models, a text, and shorter measurements."""

from functools import partial
from pathlib import Path

import pytest

from pop_local.measure import estimate, probes
from pop_local.measure.lookups import LookupSettings
from pop_local.workflows import bench
from pop_local.workflows.conversion import convert_model, search, trial_runner
from support import calibrating
from support.synthetic import make_gguf


@pytest.fixture(autouse=True)
def little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw random tokens once, measure few windows, and ask one question about one document.

    No other program uses the processor.

    `bench` skips the unpatched library, which needs three more processes; test_bench.py runs it.
    """
    few = partial(LookupSettings, n_per_document=1, n_tokens=256)
    for module in (convert_model, trial_runner):
        monkeypatch.setattr(module, "N_DOCUMENTS", 1)
        monkeypatch.setattr(module, "LookupSettings", few)
    monkeypatch.setattr(probes, "N_DRAWS", 1)
    monkeypatch.setattr(bench, "has_kernels", lambda: False)
    monkeypatch.setattr(estimate, "_N_BOOTSTRAP", 20)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Write a random model of 8 layers, the only file in tmp_path."""
    return make_gguf(tmp_path / "tiny.gguf", "llama")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text to fit on, which tests must not change."""
    return calibrating.words(tmp_path_factory.mktemp("words"))


@pytest.fixture
def short_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_model, "N_WINDOWS", 1)


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few windows, and try no rules with fewer deep rows."""
    monkeypatch.setattr(search.Search, "trade_rows", lambda _: None)
    monkeypatch.setattr(trial_runner, "N_WINDOWS", 2)
