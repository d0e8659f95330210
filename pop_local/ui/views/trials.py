"""How the search for a boundary is shown: what was allowed, and a line for each one measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pop_local.ui.tables import Column, Fact, Table, print_table
from pop_local.ui.theme import out

if TYPE_CHECKING:
    from converter.format import Budget
    from pop_local.workflows.results import Trial


def budget_fact(budget: Budget) -> Fact:
    return (
        "Budget",
        f"{budget.quality}: KL at most {budget.max_kl:g}, copy ratio at most "
        f"{budget.max_copy_ratio:g}, {budget.least_retention:.0%} of copying kept",
    )


def show_trials(trials: Sequence[Trial]) -> None:
    """A table on stdout, and an empty line."""
    columns = (
        Column("boundary", "Boundary", numeric=True),
        Column("n_skipped", "Skipped", numeric=True),
        Column("speedup_limit", "Limit", numeric=True),
        Column("n_windows", "Windows", numeric=True),
        Column("kl_mean", "KL", numeric=True),
        Column("copy_ppl_ratio", "Copy ratio", numeric=True),
        Column("induction_retention", "Retention", numeric=True),
        Column("in_budget", "In budget"),
    )
    print_table(Table(columns, tuple(_cells(trial) for trial in trials)))
    out.file.write("\n")


def _cells(trial: Trial) -> tuple[str, ...]:
    kept, error = trial.induction_retention, trial.induction_retention_se
    return (
        str(trial.boundary),
        str(trial.n_skipped),
        f"{trial.speedup_limit:.2f}x",
        str(trial.n_windows),
        f"{trial.kl_mean:.4f} ± {trial.kl_se:.4f}",
        f"{trial.copy_ppl_ratio:.3f} ± {trial.copy_ppl_ratio_se:.3f}",
        "-" if kept is None else f"{kept:.1%} ± {error or 0:.1%}",
        "yes" if trial.in_budget else "no",
    )
