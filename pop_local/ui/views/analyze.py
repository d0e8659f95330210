"""The output of `analyze`: a JSON object, or a report with a table, details, and a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pop_local.ui.tables import Column, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import bare, figures

if TYPE_CHECKING:
    from pop_local.measure.estimate import Estimate
    from pop_local.research.analyze import Analysis, DepthCost


def as_json(found: Analysis) -> dict[str, Any]:
    """Return the analysis as a JSON object. NAME_se is the standard error of NAME."""
    chosen = found.chosen
    return {
        "model": str(found.model),
        "boundaries": [_depth_json(depth) for depth in found.depths],
        "calibration": found.calibration,
        "chosen": {
            "budget": found.budget,
            "boundary": chosen and chosen.boundary,
            "projection": chosen and chosen.projection,
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


def show(found: Analysis, *, as_markdown: bool = False) -> None:
    layers = sorted(depth.boundary for depth in found.depths)
    print_table([*_columns(found)], layers, as_markdown=as_markdown)
    print_sentence("")
    if (made := found.calibration) is not None:
        print_facts([("Fitted on", f"{made.name}: {made.n_tokens:,} tokens")])
    print_sentence(_choice(found))


def _columns(found: Analysis) -> Iterator[Column]:
    """Yield the columns. Each row shows the cost of skipping a layer and all later layers."""
    depths = {depth.boundary: depth for depth in found.depths}

    def of_depth(title: str, show: Callable[[DepthCost], object], numeric: bool = True) -> Column:
        return Column(title, lambda at: show(depths[at]), numeric)

    yield Column("Layer", lambda layer: layer, numeric=True)
    yield of_depth("Limit", lambda depth: f"{depth.speedup_limit:.2f}x")
    yield of_depth("K/V", lambda depth: depth.projection, numeric=False)
    yield of_depth("KL", lambda depth: depth.quality and bare(depth.quality.kl_mean, ".3f"))
    yield of_depth("Copy", lambda d: d.quality and bare(d.quality.copy_ppl_ratio, ".2f"))
    yield of_depth("Induction", lambda depth: _share(depth.retention))
    name = found.budget.quality
    yield of_depth("Note", lambda depth: name if depth is found.chosen else "", numeric=False)


def _choice(found: Analysis) -> str:
    name, depth = found.budget.quality, found.chosen
    if depth is None or depth.quality is None:
        return f"The {name} budget does not allow any of the measured boundaries."
    return (
        f"The {name} budget allows skipping layers {depth.boundary} and up, for a speedup of up to"
        f" {depth.speedup_limit:.2f}x. The loss was measured on {depth.quality.n_windows} windows."
        " The `convert` command measures the loss on more windows."
    )


def _share(share: Estimate | None) -> str:
    return "-" if share is None else f"{round(share.value, 2) + 0.0:.0%}"
