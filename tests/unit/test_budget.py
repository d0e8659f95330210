"""The decision of a budget: what is inside, where to begin, what to measure next."""

from types import SimpleNamespace

import pytest

from pop_local.measure.budget import (
    BALANCED,
    BUDGETS,
    FAST,
    NEAR_LOSSLESS,
    Bracket,
    deepest_inside,
    is_clearly_outside,
    is_hopeless,
    is_inside,
    is_promising,
    next_boundary,
    worth_fitting,
)
from pop_local.measure.estimate import Estimate


def quality(kl=0.02, copy=1.05, retention=0.95, se=0.0):
    """The three figures of a budget; `retention` None: the full model has none."""
    return SimpleNamespace(
        kl_mean=Estimate(kl, se),
        copy_ppl_ratio=Estimate(copy, se),
        induction_retention=None if retention is None else Estimate(retention, se),
    )


def searched(bracket: Bracket, deepest: int) -> tuple[int | None, list[int]]:
    """What is found, and what is measured for it, when all from `deepest` on is inside."""
    verdicts: dict[int, bool] = {}
    while (boundary := next_boundary(bracket, verdicts)) is not None:
        assert boundary not in verdicts
        assert bracket.deepest <= boundary <= bracket.shallowest
        verdicts[boundary] = boundary >= deepest
    return deepest_inside(verdicts), list(verdicts)


# --- one boundary


@pytest.mark.parametrize(
    ("figures", "inside"),
    [
        ({}, True),
        ({"kl": 0.035, "copy": 1.12, "retention": 0.85}, True),
        ({"kl": 0.0351}, False),
        ({"copy": 1.121}, False),
        ({"retention": 0.849}, False),
        ({"retention": None}, True),
        ({"kl": 0.05, "retention": None}, False),
    ],
)
def test_every_figure_must_be_within(figures, inside):
    assert is_inside(BALANCED, quality(**figures)) is inside


@pytest.mark.parametrize(
    ("figures", "clear"),
    [
        ({"kl": 0.045, "se": 0.004}, True),
        ({"kl": 0.045, "se": 0.006}, False),
        ({"copy": 1.2, "se": 0.03}, True),
        ({"copy": 1.2, "se": 0.05}, False),
        ({"retention": 0.7, "se": 0.07}, True),
        ({"retention": 0.7, "se": 0.08}, False),
        ({"se": 0.001}, False),
    ],
)
def test_two_standard_errors_beyond_a_limit_are_enough(figures, clear):
    assert is_clearly_outside(BALANCED, quality(**figures)) is clear


def test_one_window_has_no_error_and_decides():
    assert is_clearly_outside(BALANCED, quality(kl=0.04, se=None))


def test_a_fit_is_expected_to_help_the_kl_but_not_the_copying():
    own = quality(kl=0.15, copy=1.4)
    assert is_promising(BALANCED, own, fitted=True)
    assert not is_promising(BALANCED, own, fitted=False)
    assert is_promising(BALANCED, quality(retention=0.82), fitted=True)
    assert not is_promising(BALANCED, quality(retention=0.75), fitted=True)
    assert not is_hopeless(BALANCED, Estimate(0.6, 0.01))
    assert is_hopeless(BALANCED, Estimate(0.5, 0.01))
    assert not is_hopeless(BALANCED, None)


def test_budgets_are_ordered_and_named():
    assert [BUDGETS[name] for name in BUDGETS] == [NEAR_LOSSLESS, BALANCED, FAST]
    for stricter, looser in ((NEAR_LOSSLESS, BALANCED), (BALANCED, FAST)):
        assert stricter.max_kl < looser.max_kl
        assert stricter.max_copy_ratio < looser.max_copy_ratio
        assert stricter.least_retention > looser.least_retention


# --- the search


@pytest.mark.parametrize("guess", range(15, 30))
def test_the_deepest_inside_is_found_from_any_guess(guess):
    for deepest in range(14, 31):
        found, measured = searched(Bracket(15, guess, 29), deepest)
        assert found == (max(deepest, 15) if deepest <= 29 else None)
        assert len(measured) <= 8


@pytest.mark.parametrize(
    ("deepest", "measured"),
    [
        (20, [20, 19]),
        (21, [20, 21]),
        (19, [20, 19, 17, 18]),
        (22, [20, 21, 23, 22]),
    ],
)
def test_a_good_guess_takes_two_measurements(deepest, measured):
    assert searched(Bracket(15, 20, 29), deepest) == (deepest, measured)


def test_what_is_past_the_cliff_is_not_measured():
    assert searched(Bracket(18, 18, 29), 15) == (18, [18])


def test_neighbours_that_may_be_asked_for_are_fitted_together():
    bracket = Bracket(15, 20, 29)
    assert worth_fitting(bracket, {}, 20) == (20, 19, 21)
    assert worth_fitting(bracket, {20: False, 21: False}, 23) == (23, 22, 24)
    assert worth_fitting(bracket, {20: True, 18: False}, 19) == (19,)
    assert worth_fitting(Bracket(20, 20, 29), {}, 20) == (20, 21)
