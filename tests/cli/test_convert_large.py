"""Test `convert` with too little memory to fit each boundary, simulated on a tiny model."""

import json

import pytest

from pop_local.calibration import activations, needs
from support.conversion_runs import FEW, LOOSE, convert

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_search", "few_fit")]


@pytest.fixture
def few_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the sums to two of the boundaries 2 to 6."""
    monkeypatch.setattr(needs, "MOST_SUMS_BYTES", 4_200_000)


def test_few_boundaries_are_fitted_in_one_pass(tiny, letters, monkeypatch):
    read: list[int] = []

    def window(self, tokens, real=activations.WindowReader.window):
        read.extend([1] * bool(self._wanted.layers))
        return real(self, tokens)

    monkeypatch.setattr(activations.WindowReader, "window", window)
    planned = convert(tiny, "--text", letters, *FEW, *LOOSE, "--dry-run")
    assert "Boundaries 7, 5, 3" in " ".join(planned.stdout.split())
    done = convert(tiny, "--text", letters, *FEW, *LOOSE, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    tried = [(each["boundary"], each["projection"]) for each in found["tried"]]
    assert tried == [(5, "fitted"), (3, "fitted")]
    assert (found["boundary"], found["projection"]) == (3, "fitted")
    assert len(read) == 2048 // 512
