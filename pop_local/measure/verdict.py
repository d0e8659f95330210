"""Describe the loss from pruning, based on the measured values and their errors."""

from typing import TYPE_CHECKING

from pop_converter.popfile.format import Measured

if TYPE_CHECKING:
    from pop_local.measure.compare import Comparison

# Largest relative increase in perplexity that is not visible in answers.
_INVISIBLE = 0.01
# A difference within 2 standard errors, or with a p-value of 0.05 or more, may be due to chance.
_BY_CHANCE, _LEAST_P = 2.0, 0.05


def verdict_in_words(found: Measured) -> str:
    """Describe the loss that pruning causes on prose and on exact strings."""
    return f"Prose: {_prose(found)}. Exact strings: {_strings(found)}."


def _prose(found: Measured) -> str:
    more, error = found.ppl_ratio - 1, found.ppl_ratio_se
    if more + _BY_CHANCE * error <= _INVISIBLE:
        return "no visible loss"
    if more <= _BY_CHANCE * error:
        return f"no significant loss (perplexity {more:+.1%} ± {error:.1%})"
    return f"perplexity {more:.1%} higher"


def _strings(found: Measured) -> str:
    if not found.lookups_n:
        return "not measured"
    if not found.lookups_full:
        return f"the full model answers none of the {found.lookups_n} questions correctly"
    return f"{found.lookups_lost or 'none'} of {found.lookups_full} lost"


def comparison_in_words(found: "Comparison") -> str:
    """State how many correct answers become wrong with pruning, or how many answers change."""
    if not found.n_judged:
        n, n_changed = len(found.answers), len(found.different)
        return f"Fast reading changed {n_changed} of {n} answers. No expected answers were given."
    n_lost = found.n_only_full or "none"
    lost = f"Fast reading makes {n_lost} of {found.full_hits} correct answers wrong"
    if found.n_only_pruned:
        lost += f" and corrects {found.n_only_pruned} of the others"
    if found.n_only_full + found.n_only_pruned:
        certainty = "may be" if found.p_value >= _LEAST_P else "is unlikely to be"
        lost = f"{lost}, which {certainty} due to chance"
    return f"{lost}."
