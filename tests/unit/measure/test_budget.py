"""Budgets: verdicts, and the next boundaries to measure."""

from types import SimpleNamespace

import pytest

from pop_converter.popfile.format import Budget
from pop_local.measure.budget import (
    BALANCED,
    FAST,
    NEAR_LOSSLESS,
    copies,
    is_inside,
    keeps_lookups,
    limits_in_words,
    undecided,
)
from pop_local.measure.estimate import Estimate


def quality(kl=0.02, ppl=1.01, copy=1.05, retention=0.95, se=0.0):
    """Return the figures that a budget limits (`retention` None: the full model has none)."""
    return SimpleNamespace(
        kl_mean=Estimate(kl, se),
        ppl_ratio=Estimate(ppl, 0.0),
        copy_ppl_ratio=Estimate(copy, se),
        induction_retention=None if retention is None else Estimate(retention, se),
    )


def lookups(n_lost, n_full=200):
    return SimpleNamespace(lost=n_lost, full=n_full)


def searched(deepest: int) -> tuple[int | None, list[int]]:
    """Return the boundary found among 15 to 29, if all from `deepest` on are inside; the tried."""
    verdicts: dict[int, bool] = {}
    while candidates := undecided(range(15, 30), verdicts):
        assert candidates[0] not in verdicts
        verdicts[candidates[0]] = candidates[0] >= deepest
    inside = (boundary for boundary, passed in verdicts.items() if passed)
    return min(inside, default=None), list(verdicts)


# --- verdicts


@pytest.mark.parametrize(
    ("figures", "inside"),
    [
        ({}, True),
        ({"kl": 0.06, "ppl": 1.03, "copy": 1.1}, True),
        ({"kl": 0.0601}, False),
        ({"ppl": 1.031}, False),
        ({"copy": 1.101}, False),
        ({"retention": 0.1}, True),
    ],
)
def test_every_figure_must_be_within_budget(figures, inside):
    assert is_inside(BALANCED, quality(**figures)) is inside


@pytest.mark.parametrize(
    ("figures", "copied"),
    [
        ({}, True),
        ({"copy": 1.3, "retention": 0.7}, True),
        ({"copy": 1.31}, False),
        ({"retention": 0.69}, False),
        ({"retention": None}, True),
        ({"kl": 1.0, "ppl": 2.0}, True),
    ],
)
def test_model_must_copy_in_both_probes(figures, copied):
    assert copies(quality(**figures)) is copied


@pytest.mark.parametrize(
    ("budget", "counts", "is_inside_budget"),
    [
        (NEAR_LOSSLESS, lookups(0), True),
        (NEAR_LOSSLESS, lookups(1), False),
        (BALANCED, lookups(4), True),
        (BALANCED, lookups(5), False),
        (BALANCED, lookups(4, 199), False),
        (FAST, lookups(20), True),
        (FAST, lookups(21), False),
    ],
)
def test_lost_look_ups_are_a_share_of_the_full_models(budget, counts, is_inside_budget):
    assert keeps_lookups(budget, counts) is is_inside_budget


# --- the search


@pytest.mark.parametrize("deepest", range(14, 31))
def test_deepest_candidate_needs_few_measurements(deepest):
    boundary, measured = searched(deepest)
    assert boundary == (max(deepest, 15) if deepest <= 29 else None)
    assert len(measured) <= (3 if 21 <= deepest <= 24 else 7)


def test_later_verdict_may_reverse_an_earlier_one():
    assert undecided(range(15, 22), {18: True, 16: False, 17: False}) == ()
    assert undecided(range(15, 22), {18: False, 20: True, 16: False, 17: False}) == (19,)


def test_missing_limits_are_not_shown():
    older = Budget("mine", max_kl=0.1, max_copy_ratio=1.1)
    assert limits_in_words(older) == "KL 0.1, copy ratio 1.1"
    balanced = "KL 0.06, perplexity ratio 1.03, copy ratio 1.1, 2% of look-ups lost"
    assert limits_in_words(BALANCED) == balanced
