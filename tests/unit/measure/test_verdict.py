"""Verdicts in words, from figures and their errors."""

from types import SimpleNamespace
from typing import Any

import pytest

from pop_converter.popfile.format import Measured
from pop_local.measure.verdict import comparison_in_words, verdict_in_words


@pytest.mark.parametrize(
    ("ratio", "error", "expected"),
    [
        (1.002, 0.003, "no visible loss"),
        (0.98, 0.01, "no visible loss"),
        (1.002, 0.006, "no significant loss (perplexity +0.2% ± 0.6%)"),
        (1.03, 0.009, "perplexity 3.0% higher"),
        (1.008, 0.0, "no visible loss"),
    ],
)
def test_prose_is_judged_by_perplexity_and_its_error(ratio, error, expected) -> None:
    verdict = verdict_in_words(Measured(ppl_ratio=ratio, ppl_ratio_se=error))
    assert verdict == f"Prose: {expected}. Exact strings: not measured."


@pytest.mark.parametrize(
    ("n", "full", "lost", "expected"),
    [
        (200, 190, 0, "none of 190 lost"),
        (200, 190, 1, "1 of 190 lost"),
        (200, 0, 0, "the full model answers none of the 200 questions correctly"),
    ],
)
def test_lost_strings_are_counted_among_those_answered_in_full(n, full, lost, expected) -> None:
    figures = Measured(ppl_ratio=1.0, lookups_n=n, lookups_full=full, lookups_lost=lost)
    assert verdict_in_words(figures).endswith(f" Exact strings: {expected}.")


FEW = "makes 3 of 18 correct answers wrong"


@pytest.mark.parametrize(
    ("only_full", "only_pruned", "p", "expected"),
    [
        (0, 0, 1.0, "makes none of 18 correct answers wrong"),
        (3, 1, 0.6, f"{FEW} and corrects 1 of the others, which may be due to chance"),
        (9, 0, 0.004, "makes 9 of 18 correct answers wrong, which is unlikely to be due to chance"),
    ],
)
def test_comparison_counts_lost_right_answers(only_full, only_pruned, p, expected) -> None:
    comparison: Any = SimpleNamespace(
        answers=[None] * 20,
        n_judged=20,
        full_hits=18,
        n_only_full=only_full,
        n_only_pruned=only_pruned,
        p_value=p,
    )
    assert comparison_in_words(comparison) == f"Fast reading {expected}."


def test_without_expected_answers_only_differences_count() -> None:
    comparison: Any = SimpleNamespace(answers=[None] * 5, n_judged=0, different=[None])
    sentence = "Fast reading changed 1 of 5 answers. No expected answers were given."
    assert comparison_in_words(comparison) == sentence
