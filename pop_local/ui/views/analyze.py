"""The output of `analyze`: a JSON object, or a report with a table, details, and a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pop_local.ui.tables import Column, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import bare, figures

if TYPE_CHECKING:
    from pop_local.measure.estimate import Estimate
    from pop_local.research.analyze import Analysis, DepthCost


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as a JSON object. NAME_se is the standard error of NAME."""
    choice = analysis.chosen
    return {
        "model": str(analysis.model),
        "boundaries": [_depth_json(depth) for depth in analysis.depths],
        "calibration": analysis.calibration,
        "chosen": {
            "budget": analysis.budget,
            "boundary": choice and choice.boundary,
            "projection": choice and choice.projection,
        },
    }


def _depth_json(depth: DepthCost) -> dict[str, Any]:
    kept = depth.retention
    return {
        **fields_of(depth, "boundary", "n_skipped", "speedup_limit"),
        "induction_retention": kept and kept.value,
        "induction_retention_se": kept and kept.se,
        "projection": depth.projection,
        "quality": depth.quality and figures(depth.quality),
    }


def show(analysis: Analysis) -> None:
    layers = sorted(depth.boundary for depth in analysis.depths)
    print_table([*_columns(analysis)], layers)
    print_sentence("")
    if (calibration := analysis.calibration) is not None:
        print_facts([("Fitted on", f"{calibration.name}: {calibration.n_tokens:,} tokens")])
    print_sentence(_choice(analysis))


def _columns(analysis: Analysis) -> Iterator[Column]:
    """Yield the columns. Each row shows the cost of skipping a layer and all later layers."""
    depths = {depth.boundary: depth for depth in analysis.depths}

    def of_depth(title: str, show: Callable[[DepthCost], object], numeric: bool = True) -> Column:
        return Column(title, lambda at: show(depths[at]), numeric)

    yield Column("Layer", lambda layer: layer, numeric=True)
    yield of_depth("Limit", lambda depth: f"{depth.speedup_limit:.2f}x")
    yield of_depth("K/V", lambda depth: depth.projection, numeric=False)
    yield of_depth("KL", lambda depth: depth.quality and bare(depth.quality.kl_mean, ".3f"))
    yield of_depth("Copy", lambda d: d.quality and bare(d.quality.copy_ppl_ratio, ".2f"))
    yield of_depth("Induction", lambda depth: _share(depth.retention))
    name = analysis.budget.quality
    yield of_depth("Note", lambda depth: name if depth is analysis.chosen else "", numeric=False)


def _choice(analysis: Analysis) -> str:
    name, depth = analysis.budget.quality, analysis.chosen
    if depth is None or depth.quality is None:
        return f"The {name} budget does not allow any of the measured boundaries."
    return (
        f"The {name} budget allows skipping layers {depth.boundary} and up, for a speedup of up to"
        f" {depth.speedup_limit:.2f}x. The loss was measured on {depth.quality.n_windows} windows."
        " The `convert` command measures the loss on more windows."
    )


def _share(share: Estimate | None) -> str:
    return "-" if share is None else f"{round(share.value, 2) + 0.0:.0%}"
