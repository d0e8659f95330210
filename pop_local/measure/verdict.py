"""Verdicts on pruning in words, from figures and their errors."""

from typing import TYPE_CHECKING

from pop_converter.popfile.format import Measured

if TYPE_CHECKING:
    from pop_local.measure.compared_prompts import Comparison

# A perplexity that rises by less cannot be seen in an answer.
_INVISIBLE = 0.01
# Standard errors that chance explains, and the p that it leaves.
_BY_CHANCE, _LEAST_P = 2.0, 0.05
_CERTAIN = "Use --full to be certain."


def verdict_in_words(found: Measured) -> str:
    """Return what pruning does to prose and to exact strings."""
    return f"Prose: {_prose(found)}. Exact strings: {_strings(found)}. {_CERTAIN}"


def _prose(found: Measured) -> str:
    more, error = found.ppl_ratio - 1, found.ppl_ratio_se
    if more + _BY_CHANCE * error <= _INVISIBLE:
        return "no visible loss"
    if more <= _BY_CHANCE * error:
        return f"no loss beyond chance (perplexity {more:+.1%} ± {error:.1%})"
    return f"perplexity {more:.1%} higher"


def _strings(found: Measured) -> str:
    if not found.lookups_n:
        return "not measured"
    if not found.lookups_full:
        return f"the full model finds none of {found.lookups_n} either"
    return f"{found.lookups_lost or 'none'} of {found.lookups_full} lost"


def comparison_in_words(found: "Comparison") -> str:
    """Return what pruning does to answers: how many right ones are lost, or how many differ."""
    n = len(found.answers)
    if not found.n_judged:
        differ = f"{len(found.different) or 'none'} of {n} differ"
        return f"Answers: {differ}; none was compared with an expected one. {_CERTAIN}"
    lost = f"{found.n_only_full or 'none'} of {found.full_hits} right ones lost"
    if found.n_only_pruned:
        lost += f", {found.n_only_pruned} gained"
    if found.n_only_full + found.n_only_pruned:
        is_chance = found.p_value >= _LEAST_P
        lost += ", which may be chance" if is_chance else ", which is more than chance"
    return f"Answers: {lost}. {_CERTAIN}"
