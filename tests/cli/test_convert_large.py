"""Test `convert` with too little memory to fit each boundary, simulated on a tiny model."""

import json

import pytest

from pop_converter.projection import Projection
from pop_local.calibration import activations, needs
from pop_local.workflows.conversion.search import Search
from support.conversion_runs import FEW, LOOSE, convert

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_search", "few_fit")]


@pytest.fixture
def few_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the sums to two of the boundaries 2 to 6."""
    monkeypatch.setattr(needs, "MOST_SUMS_BYTES", 4_200_000)


@pytest.fixture
def own_pass_at(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the deepest boundary within the budget without a fit.

    All fits are within the budget.
    """

    def passing(shallowest: int) -> None:
        def judge(self, candidate, real=Search.judge):
            real(self, candidate)
            is_own = candidate.plan.projection == Projection.OWN
            candidate.is_inside = not is_own or candidate.plan.boundary >= shallowest

        monkeypatch.setattr(Search, "judge", judge)

    return passing


def found_by(tiny, letters, *options: object):
    done = convert(tiny, "--text", letters, *FEW, *LOOSE, *options, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    return found, [(each["boundary"], each["projection"]) for each in found["tried"]]


def test_few_boundaries_are_fitted_in_one_pass(tiny, letters, own_pass_at, monkeypatch):
    read: list[int] = []

    def window(self, tokens, real=activations.WindowReader.window):
        read.extend([1] * bool(self._wanted.layers))
        return real(self, tokens)

    monkeypatch.setattr(activations.WindowReader, "window", window)
    own_pass_at(7)
    found, tried = found_by(tiny, letters)
    assert tried == [(7, "own"), (6, "own"), (5, "own"), (6, "fitted-wide"), (3, "fitted-wide")]
    assert (found["boundary"], found["projection"]) == (3, "fitted-wide")
    assert found["budget"]["tried"].startswith("7 own (names) inside, 6 own (names) outside, ")
    assert len(read) == 2048 // 512


def test_fits_are_tried_deeper_than_own_projections_inside(tiny, letters, own_pass_at):
    own_pass_at(4)
    found, tried = found_by(tiny, letters)
    assert [boundary for boundary, kind in tried if kind != "own"] == [3, 2]
    assert (found["boundary"], found["projection"]) == (2, "fitted")


def test_own_projections_are_chosen_if_no_boundary_is_deeper(tiny, letters, own_pass_at, tmp_path):
    own_pass_at(2)
    found, tried = found_by(tiny, letters)
    assert {kind for _, kind in tried} == {"own"}
    assert (found["boundary"], found["projection"]) == (2, "own")
    assert found["calibration"] is None


def test_a_named_projection_is_fitted_without_own_ones(tiny, letters, own_pass_at):
    own_pass_at(7)
    _, tried = found_by(tiny, letters, "--projection", "fitted")
    assert {kind for boundary, kind in tried if boundary < 7} == {"fitted"}
