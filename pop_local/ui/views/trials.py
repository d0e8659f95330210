"""The output of a search for a boundary: the budget, and a table of measured candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pop_local.measure.budget import limits_in_words
from pop_local.ui.console import out
from pop_local.ui.tables import Column, Fact, print_table
from pop_local.ui.views.quality_figures import figures, with_se

if TYPE_CHECKING:
    from pop_converter.popfile.format import Budget
    from pop_converter.popfile.pruning_plan import Plan
    from pop_local.measure.lookups import Lookups
    from pop_local.workflows.conversion.refusals import Trial


def _estimate(name: str, title: str, spec: str) -> Column:
    return Column(title, lambda trial: with_se(getattr(trial.quality, name), spec), numeric=True)


_COLUMNS = (
    Column("Boundary", lambda trial: trial.plan.boundary, numeric=True),
    Column("Skipped", lambda trial: trial.plan.n_skipped, numeric=True),
    Column("K/V", lambda trial: _kind(trial.plan)),
    Column("Deep rows", lambda trial: f"{trial.plan.deep_rows} {trial.plan.deep_share:.0%}"),
    Column("Limit", lambda trial: f"{trial.plan.speedup_limit:.2f}x", numeric=True),
    Column("Windows", lambda trial: trial.quality.n_windows, numeric=True),
    _estimate("kl_mean", "KL", ".4f"),
    _estimate("ppl_ratio", "PPL ratio", ".3f"),
    _estimate("copy_ppl_ratio", "Copy ratio", ".3f"),
    Column("Look-ups lost", lambda trial: trial.lookups and _lost(trial.lookups), numeric=True),
    Column("In budget", lambda trial: "yes" if trial.in_budget else "no"),
)
# Names of the figures that a budget limits, as `figures` returns them.
_JUDGED = (
    *("n_windows", "kl_mean", "kl_se", "ppl_ratio", "ppl_ratio_se", "copy_ppl_ratio"),
    "copy_ppl_ratio_se",
)


def _kind(plan: Plan) -> str:
    return f"{plan.projection}, distilled" if plan.is_distilled else plan.projection


def _lost(found: Lookups) -> str:
    return f"{found.lost} of {found.full}"


def budget_fact(budget: Budget) -> Fact:
    return "Budget", f"{budget.quality} allows {limits_in_words(budget)}"


def show_trials(trials: Sequence[Trial]) -> None:
    print_table(_COLUMNS, trials)
    out.file.write("\n")


def trial_json(trial: Trial) -> dict[str, Any]:
    """Return a candidate for JSON, with the figures that a budget limits."""
    plan, found = trial.plan, figures(trial.quality)
    return {
        "boundary": plan.boundary,
        "n_skipped": plan.n_skipped,
        "projection": plan.projection,
        "distilled": plan.is_distilled,
        "deep_rows": plan.deep_rows,
        "deep_share": plan.deep_share,
        "speedup_limit": plan.speedup_limit,
        **{name: found[name] for name in _JUDGED},
        "lookups": trial.lookups and figures(trial.lookups),
        "in_budget": trial.in_budget,
    }
