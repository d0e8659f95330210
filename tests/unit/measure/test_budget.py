"""The decision of a budget: what is inside, where to begin, what to measure next."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pop_converter.popfile.format import Budget
from pop_local.measure.budget import (
    BALANCED,
    BUDGETS,
    FAST,
    NEAR_LOSSLESS,
    copies,
    deepest_inside,
    is_clear,
    is_hopeless,
    is_inside,
    is_open,
    limits_in_words,
    recalls,
    undecided,
)
from pop_local.measure.estimate import Estimate, mean


def quality(kl=0.02, ppl=1.01, copy=1.05, retention=0.95, se=0.0):
    """The four figures of a budget; `retention` None: the full model has none."""
    return SimpleNamespace(
        kl_mean=Estimate(kl, se),
        ppl_ratio=Estimate(ppl, 0.0),
        copy_ppl_ratio=Estimate(copy, se),
        induction_retention=None if retention is None else Estimate(retention, se),
    )


def facts(n_lost, n_documents, n_won=0):
    """Some documents' facts are lost, and some are found by the pruned model alone."""
    each = np.zeros(n_documents)
    each[:n_lost], each[n_documents - n_won :] = 1, -1
    return SimpleNamespace(n_documents=n_documents, exact_lost=mean(each))


def searched(deepest: int) -> tuple[int | None, list[int]]:
    """The boundary found of 15 to 29, and those measured, when all from `deepest` on is inside."""
    verdicts: dict[int, bool] = {}
    while wanted := undecided(range(15, 30), verdicts):
        assert wanted[0] not in verdicts
        verdicts[wanted[0]] = wanted[0] >= deepest
    return deepest_inside(verdicts), list(verdicts)


# --- one boundary


@pytest.mark.parametrize(
    ("figures", "inside"),
    [
        ({}, True),
        ({"kl": 0.06, "ppl": 1.03, "copy": 1.1, "retention": 0.85}, True),
        ({"kl": 0.0601}, False),
        ({"ppl": 1.031}, False),
        ({"copy": 1.101}, False),
        ({"retention": 0.849}, False),
        ({"retention": None}, True),
        ({"kl": 0.07, "retention": None}, False),
    ],
)
def test_every_figure_must_be_within(figures, inside):
    assert is_inside(BALANCED, quality(**figures)) is inside


@pytest.mark.parametrize(
    ("figures", "copied"),
    [
        ({}, True),
        ({"copy": 1.2}, False),
        ({"retention": 0.8}, False),
        ({"retention": None}, True),
        ({"kl": 0.07}, True),
        ({"ppl": 1.04}, True),
    ],
)
def test_only_the_copying_figures_decide_whether_copying_works(figures, copied):
    found = quality(**figures)
    assert copies(BALANCED, found) == copied
    assert copies(FAST, found)


@pytest.mark.parametrize(
    ("figures", "clear"),
    [
        ({"kl": 0.072, "se": 0.0039}, True),
        ({"kl": 0.072, "se": 0.0041}, False),
        ({"copy": 1.22, "se": 0.039}, True),
        ({"copy": 1.22, "se": 0.041}, False),
        ({"retention": 0.7, "se": 0.049}, True),
        ({"retention": 0.7, "se": 0.051}, False),
        ({"kl": 0.045, "se": 0.0049}, True),
        ({"kl": 0.045, "se": 0.0051}, False),
        ({"kl": 0.02, "copy": 1.08, "se": 0.007}, False),
        ({"kl": 0.07, "copy": 1.09, "se": 0.007}, False),
    ],
)
def test_three_standard_errors_from_all_limits_or_past_one_are_enough(figures, clear):
    assert is_clear(BALANCED, quality(**figures)) is clear


def test_one_window_has_no_error_and_decides():
    assert is_clear(BALANCED, quality(kl=0.07, se=None))


@pytest.mark.parametrize(
    ("budget", "found", "kept", "is_settled"),
    [
        (BALANCED, facts(0, 12), True, True),
        (BALANCED, facts(0, 12, 1), True, True),
        (BALANCED, facts(1, 12), True, False),
        (BALANCED, facts(2, 12), False, False),
        (BALANCED, facts(4, 12), False, True),
        (BALANCED, facts(2, 24), True, False),
        (BALANCED, facts(3, 24), False, False),
        (BALANCED, facts(5, 24), False, True),
        # Facts found by chance make nobody more lenient.
        (BALANCED, facts(5, 24, 3), True, False),
        (BALANCED, facts(6, 24, 3), False, False),
        (FAST, facts(2, 12), True, False),
        (FAST, facts(4, 24), True, False),
        (FAST, facts(5, 24), False, False),
        (FAST, facts(7, 24), False, True),
        (FAST, facts(12, 12), False, True),
    ],
)
def test_as_many_facts_may_be_lost_as_chance_explains(budget, found, kept, is_settled):
    assert recalls(budget, found) is kept
    assert is_open(budget, found) is not is_settled


def test_no_fit_brings_back_what_is_lost():
    assert not is_hopeless(BALANCED, Estimate(0.6, 0.01))
    assert is_hopeless(BALANCED, Estimate(0.5, 0.01))
    assert not is_hopeless(BALANCED, None)


def test_budgets_are_ordered_and_named():
    assert [BUDGETS[name] for name in BUDGETS] == [NEAR_LOSSLESS, BALANCED, FAST]
    for stricter, looser in ((NEAR_LOSSLESS, BALANCED), (BALANCED, FAST)):
        assert stricter.max_kl < looser.max_kl
        assert stricter.max_ppl_ratio < looser.max_ppl_ratio
        assert stricter.max_copy_ratio < looser.max_copy_ratio
        assert stricter.least_retention > looser.least_retention


# --- the search


@pytest.mark.parametrize("deepest", range(14, 31))
def test_the_deepest_inside_is_found_in_few_steps(deepest):
    found, measured = searched(deepest)
    assert found == (max(deepest, 15) if deepest <= 29 else None)
    assert len(measured) <= (3 if 21 <= deepest <= 24 else 7)


def test_boundaries_are_fitted_in_the_order_in_which_they_may_be_asked_for():
    assert undecided(range(15, 22), {}) == (18, 17, 19, 16, 20, 15, 21)
    assert undecided(range(15, 22), {18: True}) == (17, 16, 15)
    assert undecided(range(15, 22), {18: False}) == (19, 20, 21)
    assert undecided(range(15, 22), {18: True, 17: True}) == (16, 15)
    assert undecided(range(10, 22), {18: True, 17: True, 16: True})[0] == 14
    assert undecided(range(15, 22), {18: True, 16: False}) == (17,)
    assert undecided(range(15, 22), {18: True, 17: False}) == ()


def test_what_was_inside_on_few_windows_may_be_outside_on_all():
    assert undecided(range(15, 22), {18: True, 16: False, 17: False}) == ()
    assert undecided(range(15, 22), {18: False, 20: True, 16: False, 17: False}) == (19,)


def test_a_limit_that_a_budget_does_not_have_is_not_said():
    older = Budget("mine", max_kl=0.1, max_copy_ratio=1.1, least_retention=0.85)
    said = "KL 0.1, copy ratio 1.1, 85% kept of copying random tokens"
    assert limits_in_words(older) == said
    assert limits_in_words(replace(older, max_lost_recall=0.03)) == f"{said}, 3% of facts lost"
