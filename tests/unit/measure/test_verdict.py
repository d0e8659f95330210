"""Verdicts in words: they follow from the figures and their errors."""

from types import SimpleNamespace
from typing import Any

import pytest

from pop_converter.popfile.format import Measured
from pop_local.measure.verdict import comparison_in_words, verdict_in_words


@pytest.mark.parametrize(
    ("ratio", "error", "said"),
    [
        (1.002, 0.003, "no visible loss"),
        (0.98, 0.01, "no visible loss"),
        (1.002, 0.006, "no loss beyond chance (perplexity +0.2% ± 0.6%)"),
        (1.03, 0.009, "perplexity 3.0% higher"),
        (1.008, 0.0, "no visible loss"),
    ],
)
def test_prose_is_judged_by_the_perplexity_and_its_error(ratio, error, said) -> None:
    found = verdict_in_words(Measured(ppl_ratio=ratio, ppl_ratio_se=error))
    assert found == f"Prose: {said}. Exact strings: not measured. Use --full to be certain."


@pytest.mark.parametrize(
    ("n", "full", "lost", "said"),
    [
        (200, 190, 0, "none of 190 lost"),
        (200, 190, 1, "1 of 190 lost"),
        (200, 0, 0, "the full model finds none of 200 either"),
    ],
)
def test_exact_strings_are_counted_of_those_in_full(n, full, lost, said) -> None:
    found = Measured(ppl_ratio=1.0, lookups_n=n, lookups_full=full, lookups_lost=lost)
    assert f" Exact strings: {said}. " in verdict_in_words(found)


@pytest.mark.parametrize(
    ("only_full", "only_pruned", "p", "said"),
    [
        (0, 0, 1.0, "none of 18 right ones lost"),
        (3, 1, 0.6, "3 of 18 right ones lost, 1 gained, which may be chance"),
        (9, 0, 0.004, "9 of 18 right ones lost, which is more than chance"),
    ],
)
def test_a_comparison_counts_right_answers_that_are_lost(only_full, only_pruned, p, said) -> None:
    found: Any = SimpleNamespace(
        answers=[None] * 20,
        n_judged=20,
        full_hits=18,
        n_only_full=only_full,
        n_only_pruned=only_pruned,
        p_value=p,
    )
    assert comparison_in_words(found) == f"Answers: {said}. Use --full to be certain."


def test_answers_without_expected_ones_are_only_different() -> None:
    found: Any = SimpleNamespace(answers=[None] * 5, n_judged=0, different=[None])
    assert comparison_in_words(found).startswith("Answers: 1 of 5 differ; none was compared")
