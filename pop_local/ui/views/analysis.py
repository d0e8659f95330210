"""How an analysis is shown: a table, findings in words, JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pop_converter.projection import Projection
from pop_local.ui.tables import Column, Fact, Table, markdown, print_facts
from pop_local.ui.theme import say
from pop_local.ui.views.quality import bare, figures, text_json, with_se

if TYPE_CHECKING:
    from pop_local.research.analyze import Analysis
    from pop_local.research.depths import DepthCost
    from pop_local.research.importance import Stage


def as_json(found: Analysis) -> dict[str, Any]:
    """Estimates as a value and its standard error, NAME and NAME_se."""
    chosen = found.chosen
    return {
        "model": str(found.model),
        "text": text_json(found.text),
        "seed": found.seed,
        "gates": found.importance,
        "boundaries": [_depth_json(depth) for depth in found.depths],
        "cliff_layers": [depth.boundary for depth in found.cliff],
        "calibration": found.calibration,
        "chosen": {
            "budget": found.budget,
            "boundary": chosen and chosen.boundary,
            "projection": chosen and chosen.projection,
            "is_estimate": True,
        },
    }


def _depth_json(depth: DepthCost) -> dict[str, Any]:
    kept = depth.retention
    return {
        "boundary": depth.boundary,
        "n_skipped": depth.n_skipped,
        "speedup_limit": depth.speedup_limit,
        "induction_retention": kept and kept.value,
        "induction_retention_se": kept and kept.se,
        "lost_retention": depth.lost_retention,
        "projection": depth.projection,
        "quality": depth.quality and figures(depth.quality),
    }


def show(found: Analysis) -> None:
    say(f"{markdown(_table(found))}\n")
    print_facts([*_facts(found)])


_GATES = (Column("prefill", "Prefill", numeric=True), Column("decode", "Decode", numeric=True))
_DEPTHS = (
    Column("speedup_limit", "Limit", numeric=True),
    Column("projection", "K/V"),
    Column("kl_mean", "KL", numeric=True),
    Column("copy_ppl_ratio", "Copy", numeric=True),
    Column("induction_retention", "Induction", numeric=True),
    Column("lost_retention", "Lost", numeric=True),
    Column("note", "Note"),
)


def _table(found: Analysis) -> Table:
    """A line for each layer, which is the boundary, too: the cost of pruning from there on."""
    gates = found.importance
    stages = () if gates is None else (gates.prefill, gates.decode)
    by_layer = {depth.boundary: depth for depth in found.depths}
    layers = range(len(stages[0].layers)) if stages else sorted(by_layer)
    rows = [
        (
            layer,
            *(with_se(stage.layers[layer], ".2f") for stage in stages),
            *(_cells(by_layer[layer], found) if layer in by_layer else ("",) * len(_DEPTHS)),
        )
        for layer in layers
    ]
    head = Column("layer", "Layer", numeric=True)
    return Table((head, *(_GATES if stages else ()), *_DEPTHS), tuple(rows))


def _cells(depth: DepthCost, found: Analysis) -> tuple[str, ...]:
    quality, kept, lost = depth.quality, depth.retention, depth.lost_retention
    return (
        f"{depth.speedup_limit:.2f}x",
        depth.projection or "",
        bare(quality.kl_mean, ".3f") if quality else "",
        bare(quality.copy_ppl_ratio, ".2f") if quality else "",
        "-" if kept is None else _share(kept.value),
        "-" if lost is None else _share(lost),
        found.budget.quality if depth is found.chosen else "cliff" if depth.is_cliff else "",
    )


def _facts(found: Analysis) -> Iterator[Fact]:
    gates, made = found.importance, found.calibration
    if gates is not None:
        windows = f"{gates.n_windows} windows of {gates.n_context} + {gates.n_answer} tokens"
        how = f"mean of (dL/dg)^2 ± one standard error over {windows}"
        yield "Importance", how
        yield "Reading", _thirds(gates.prefill)
        yield "Answering", _thirds(gates.decode)
    yield "Copying", _cliff(found)
    if made is not None:
        yield "Fitted on", f"{made.name}: {made.n_tokens:,} tokens"
    yield "Depth", _choice(found)


def _choice(found: Analysis) -> str:
    name, depth = found.budget.quality, found.chosen
    if depth is None or depth.quality is None:
        return f"no boundary that was measured is within the {name} budget"
    quality = depth.quality
    losses = f"KL {with_se(quality.kl_mean, '.4f')}, copy ratio {quality.copy_ppl_ratio.value:.3f}"
    if quality.induction_retention is not None:
        losses += f", {quality.induction_retention.value:.0%} of copying kept"
    is_own = depth.projection == Projection.OWN
    how = "with the layers' own projections" if is_own else "with the fit"
    windows = f"{quality.n_windows} window{'s' * (quality.n_windows > 1)}"
    return (
        f"{name} would take boundary {depth.boundary}, at most {depth.speedup_limit:.2f}x: "
        f"{losses} {how}; an estimate from {windows}, `convert` measures more"
    )


def _thirds(stage: Stage) -> str:
    times = f" ({with_se(stage.median_ratio, '.2f')} times)" if stage.median_ratio else ""
    return (
        f"median of the last third of the layers {with_se(stage.last_third_median, '.2f')}, of the"
        f" others {with_se(stage.others_median, '.2f')}{times}; means"
        f" {with_se(stage.last_third_mean, '.2f')} and {with_se(stage.others_mean, '.2f')}"
    )


def _cliff(found: Analysis) -> str:
    deepest = found.depths[-1]
    if deepest.lost_retention is None:
        return "the full model does not copy random tokens: induction says nothing here"
    if not found.cliff:
        return f"no single layer loses it, down to boundary {deepest.boundary}"
    layers = [f"{depth.boundary} ({_share(depth.lost_retention or 0.0)})" for depth in found.cliff]
    return f"lost with layer {' and '.join(layers)}"


def _share(value: float) -> str:
    """Without a minus before 0 %."""
    return f"{round(value, 2) + 0.0:.0%}"
