"""How the search for a boundary is shown: what was allowed, and a line for each one measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pop_local.ui.tables import Column, Fact, Table, print_table
from pop_local.ui.theme import out

if TYPE_CHECKING:
    from converter.format import Budget
    from pop_local.measure.quality import Quality


@dataclass(frozen=True)
class Trial:
    """One boundary as it was measured; for --json, too."""

    boundary: int
    n_skipped: int
    speedup_limit: float
    n_windows: int
    kl_mean: float
    kl_se: float
    copy_ppl_ratio: float
    copy_ppl_ratio_se: float
    induction_retention: float | None
    induction_retention_se: float | None
    in_budget: bool

    @classmethod
    def of(cls, quality: Quality, n_skipped: int, limit: float, in_budget: bool) -> Trial:
        retention = quality.induction_retention
        return cls(
            boundary=quality.boundary,
            n_skipped=n_skipped,
            speedup_limit=limit,
            n_windows=quality.n_windows,
            kl_mean=quality.kl_mean.value,
            kl_se=quality.kl_mean.se or 0.0,
            copy_ppl_ratio=quality.copy_ppl_ratio.value,
            copy_ppl_ratio_se=quality.copy_ppl_ratio.se or 0.0,
            induction_retention=None if retention is None else retention.value,
            induction_retention_se=None if retention is None else retention.se or 0.0,
            in_budget=in_budget,
        )


def budget_fact(budget: Budget) -> Fact:
    return (
        "Budget",
        f"{budget.quality}: KL at most {budget.max_kl:g}, copy ratio at most "
        f"{budget.max_copy_ratio:g}, {budget.least_retention:.0%} of copying kept",
    )


def limits(budget: Budget) -> str:
    """In few words; `figures` has the same order."""
    return (
        f"KL {budget.max_kl:g}, copy ratio {budget.max_copy_ratio:g}, "
        f"{budget.least_retention:.0%} kept of copying random tokens"
    )


def figures(kl: float, copy_ratio: float, retention: float | None) -> str:
    kept = "" if retention is None else f", {retention:.0%} kept of copying random tokens"
    return f"KL {kl:.4g}, copy ratio {copy_ratio:.3f}{kept}"


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
