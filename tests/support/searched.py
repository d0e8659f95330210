"""`convert` with a search, on small models and few windows."""

import pytest
from typer.testing import CliRunner, Result

from pop_local.cli import app
from pop_local.measure import gradual, probes
from pop_local.workflows import search as searching

# Random weights: nearly any pruning is a large KL, and nothing is copied.
LOOSE = ("--max-kl", 50, "--max-ppl-ratio", 1000, "--max-copy-ratio", 1000)
FEW = ("--tokens", 2048, "--threads", 1, "--gpu-layers", 0)


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradual, "N_FIRST_WINDOWS", 1)
    monkeypatch.setattr(searching, "N_WINDOWS", 2)
    monkeypatch.setattr(searching, "N_DOCUMENTS", 2)
    monkeypatch.setattr(probes, "N_DRAWS", 1)
