"""Describe the loss from pruning, based on the measured values and their errors."""

from typing import TYPE_CHECKING

from pop_converter.popfile.format import Measured

if TYPE_CHECKING:
    from pop_local.measure.compare import Comparison

# Largest relative increase in perplexity that is not visible in answers.
_INVISIBLE = 0.01
# A difference within 2 standard errors, or with a p-value of 0.05 or more, may be due to chance.
_BY_CHANCE, _LEAST_P = 2.0, 0.05


def verdict_in_words(metrics: Measured) -> str:
    """Describe the loss that pruning causes on prose and on exact strings."""
    return f"Prose: {_prose(metrics)}. Exact strings: {_strings(metrics)}."


def _prose(metrics: Measured) -> str:
    more, error = metrics.ppl_ratio - 1, metrics.ppl_ratio_se
    if more + _BY_CHANCE * error <= _INVISIBLE:
        return "no visible loss"
    if more <= _BY_CHANCE * error:
        return f"no significant loss (perplexity {more:+.1%} ± {error:.1%})"
    return f"perplexity {more:.1%} higher"


def _strings(metrics: Measured) -> str:
    if not metrics.lookups_n:
        return "not measured"
    if not metrics.lookups_full:
        return f"the full model answers none of the {metrics.lookups_n} questions correctly"
    return f"{metrics.lookups_lost or 'none'} of {metrics.lookups_full} lost"


def comparison_in_words(comparison: "Comparison") -> str:
    """State how many correct answers become wrong with pruning, or how many answers change."""
    if not comparison.n_judged:
        n, n_changed = len(comparison.answers), len(comparison.different)
        return f"Fast reading changed {n_changed} of {n} answers. No expected answers were given."
    n_lost = comparison.n_only_full or "none"
    lost = f"Fast reading makes {n_lost} of {comparison.full_hits} correct answers wrong"
    if comparison.n_only_pruned:
        lost += f" and corrects {comparison.n_only_pruned} of the others"
    if comparison.n_only_full + comparison.n_only_pruned:
        certainty = "may be" if comparison.p_value >= _LEAST_P else "is unlikely to be"
        lost = f"{lost}, which {certainty} due to chance"
    return f"{lost}."
