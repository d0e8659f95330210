"""How the search for a boundary is shown: what was allowed, and a line for each one measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pop_local.measure.budget import limits_in_words
from pop_local.ui.tables import Column, Fact, Table, print_table
from pop_local.ui.theme import out
from pop_local.ui.views.quality import figures, with_se

if TYPE_CHECKING:
    from pop_converter.popfile.format import Budget
    from pop_converter.popfile.plan import Plan
    from pop_local.measure.recall import Recall
    from pop_local.workflows.conversion.refusals import Trial

_COLUMNS = (
    Column("plan.boundary", "Boundary", numeric=True),
    Column("plan.n_skipped", "Skipped", numeric=True),
    Column("plan", "K/V", lambda plan: _kind(plan)),
    Column("plan.speedup_limit", "Limit", "{:.2f}x".format, numeric=True),
    Column("quality.n_windows", "Windows", numeric=True),
    Column("quality.kl_mean", "KL", partial(with_se, spec=".4f"), numeric=True),
    Column("quality.ppl_ratio", "PPL ratio", partial(with_se, spec=".3f"), numeric=True),
    Column("quality.copy_ppl_ratio", "Copy ratio", partial(with_se, spec=".3f"), numeric=True),
    Column("quality.induction_retention", "Retention", partial(with_se, spec=".1%"), numeric=True),
    Column("recall", "Facts found", lambda found: _of_full(found) if found else "", numeric=True),
    Column("in_budget", "In budget", lambda passed: "yes" if passed else "no"),
)
# The figures of a trial that a budget looks at.
_JUDGED = (
    *("n_windows", "kl_mean", "kl_se", "ppl_ratio", "ppl_ratio_se", "copy_ppl_ratio"),
    *("copy_ppl_ratio_se", "induction_retention", "induction_retention_se"),
)


def _kind(plan: Plan) -> str:
    return f"{plan.projection}, distilled" if plan.is_distilled else plan.projection


def _of_full(found: Recall) -> str:
    return f"{found.exact_pruned.value:.0%} of {found.exact_full.value:.0%}"


def budget_fact(budget: Budget) -> Fact:
    return "Budget", f"{budget.quality} allows {limits_in_words(budget)}"


def show_trials(trials: Sequence[Trial]) -> None:
    print_table(Table.of(_COLUMNS, trials))
    out.file.write("\n")


def trial_json(trial: Trial) -> dict[str, Any]:
    """One boundary with what the budget looks at; errors as in `figures`."""
    plan, found = trial.plan, figures(trial.quality)
    return {
        "boundary": plan.boundary,
        "n_skipped": plan.n_skipped,
        "projection": plan.projection,
        "distilled": plan.is_distilled,
        "speedup_limit": plan.speedup_limit,
        **{name: found[name] for name in _JUDGED},
        "recall": trial.recall and figures(trial.recall),
        "in_budget": trial.in_budget,
    }
