"""How an analysis is shown: a table with bars, the same as Markdown, JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import compress
from math import sqrt
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.table import Table as RichTable
from rich.text import Text as RichText

from converter.format import FITTED, OWN
from pop_local.ui.tables import Column, Fact, Table, markdown, print_facts
from pop_local.ui.theme import out
from pop_local.ui.views.quality import figures

if TYPE_CHECKING:
    from pop_local.measure.depth import Depth
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.importance import Importance, Stage
    from pop_local.measure.quality import Quality
    from pop_local.workflows.analyze import Analysis

_BAR_WIDTH = 8
_ROOMY_WIDTH, _BARS_WIDTH = 100, 80
# Columns that a narrower terminal does without: the findings below the table say it, too.
_LEAST_WIDTH = {"projection": 60, "note": 72, "lost_retention": 78}
_LEAST_WIDTH_BESIDE_BARS = {"note": 80, "projection": 88, "lost_retention": 94}

_BOUNDARY = (
    "from Limit on a row is of pruning from its layer on; KL: to the full model, nats per token of "
    "prose; Copy: perplexity of a repeated passage, in the full model's"
)
_INDUCTION = (
    "what is kept of the full model's gain on repeated random tokens, with own projections; Lost: "
    "by skipping this layer, too"
)


def as_json(found: Analysis) -> dict[str, Any]:
    """Estimates as a value and its standard error, NAME and NAME_se."""
    gates = found.importance
    return {
        "model": str(found.model),
        "text": {"name": found.text.name, "sha256": found.text.sha256},
        "seed": found.seed,
        "gates": None if gates is None else asdict(gates),
        "boundaries": [_flat(depth) for depth in found.depths],
        "cliff_layers": [depth.boundary for depth in found.cliff],
        "calibration": found.calibration and asdict(found.calibration),
        "chosen": {
            "budget": asdict(found.budget),
            "boundary": found.chosen and found.chosen.boundary,
            "projection": found.chosen and _projection(found.chosen),
            "is_estimate": True,
        },
    }


def _flat(depth: Depth) -> dict[str, Any]:
    kept, quality = depth.retention, depth.quality
    return {
        "boundary": depth.boundary,
        "n_skipped": depth.n_skipped,
        "speedup_limit": depth.speedup_limit,
        "induction_retention": kept and kept.value,
        "induction_retention_se": kept and kept.se,
        "lost_retention": depth.lost_retention,
        "projection": _projection(depth),
        "quality": None if quality is None else figures(quality),
    }


def _projection(depth: Depth) -> str | None:
    """Of `depth.quality`."""
    if depth.quality is None:
        return None
    return FITTED if depth.fitted else OWN


def show(found: Analysis) -> None:
    """On stdout: in a terminal with bars, elsewhere as Markdown; then the findings in words."""
    if out.is_terminal:
        out.print(_drawn(found))
    else:
        out.file.write(markdown(_table(found, _with_se)) + "\n\n")
    print_facts(_facts(found))


_GATE_COLUMNS = (
    Column("prefill", "Prefill", numeric=True),
    Column("decode", "Decode", numeric=True),
)
_DEPTH_COLUMNS = (
    Column("speedup_limit", "Limit", numeric=True),
    Column("projection", "K/V"),
    Column("kl_mean", "KL", numeric=True),
    Column("copy_ppl_ratio", "Copy", numeric=True),
    Column("induction_retention", "Induction", numeric=True),
    Column("lost_retention", "Lost", numeric=True),
    Column("note", "Note"),
)


def _table(found: Analysis, importance: Callable[[Estimate], str]) -> Table:
    """A line for each layer, which is the boundary, too: what pruning from there on costs."""
    gates = found.importance
    by_layer = {depth.boundary: depth for depth in found.depths}
    layers = sorted(by_layer) if gates is None else range(len(gates.prefill.layers))
    rows = []
    for layer in layers:
        row = [str(layer)]
        if gates is not None:
            stages = (gates.prefill, gates.decode)
            row += [importance(stage.layers[layer]) for stage in stages]
        rows.append((*row, *_depth_cells(by_layer.get(layer), found)))
    columns = () if gates is None else _GATE_COLUMNS
    head = Column("layer", "Layer", numeric=True)
    return Table((head, *columns, *_DEPTH_COLUMNS), tuple(rows))


def _depth_cells(depth: Depth | None, found: Analysis) -> tuple[str, ...]:
    if depth is None:
        return ("",) * len(_DEPTH_COLUMNS)
    quality, retention, lost = depth.quality, depth.retention, depth.lost_retention
    return (
        f"{depth.speedup_limit:.2f}x",
        _projection(depth) or "",
        "" if quality is None else f"{quality.kl_mean.value:.3f}",
        "" if quality is None else f"{quality.copy_ppl_ratio.value:.2f}",
        "-" if retention is None else _share(retention.value),
        "-" if lost is None else _share(lost),
        found.budget.quality if depth is found.chosen else "cliff" if depth.is_cliff else "",
    )


def _drawn(found: Analysis) -> RichTable:
    gates = found.importance
    table = _table(found, _value)
    padding = (0, 2 if out.width >= _ROOMY_WIDTH else 1, 0, 0)
    drawn = RichTable(header_style="title", box=None, padding=padding)
    with_bars = gates is not None and out.width >= _BARS_WIDTH and _draws_blocks()
    least_width = _LEAST_WIDTH_BESIDE_BARS if with_bars else _LEAST_WIDTH
    shown = [out.width >= least_width.get(column.key, 0) for column in table.columns]
    for column in compress(table.columns, shown):
        drawn.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
        if with_bars and column in _GATE_COLUMNS:
            drawn.add_column("", width=_BAR_WIDTH)
    styles = {str(depth.boundary): "bad" for depth in found.cliff}
    if found.chosen is not None:
        styles[str(found.chosen.boundary)] = "good"
    for cells in table.texts():
        style = styles.get(cells[0], "")
        row: list[RichText | Bar] = [RichText(cell, style=style) for cell in compress(cells, shown)]
        if with_bars and gates is not None:
            layer = int(cells[0])
            row.insert(3, _bar(gates.decode, layer, "yellow"))
            row.insert(2, _bar(gates.prefill, layer, "cyan"))
        drawn.add_row(*row)
    return drawn


def _draws_blocks() -> bool:
    return (out.encoding or "").lower().startswith("utf")


def _bar(stage: Stage, layer: int, color: str) -> Bar:
    """As long as the root of the importance, the size of the gradient: the squares differ a lot."""
    largest = max(estimate.value for estimate in stage.layers)
    length = sqrt(stage.layers[layer].value / largest) if largest else 0.0
    return Bar(1.0, 0.0, length, width=_BAR_WIDTH, color=color)


def _facts(found: Analysis) -> list[Fact]:
    gates = found.importance
    facts = [] if gates is None else _gate_facts(gates)
    return [
        *facts,
        ("Boundary", _BOUNDARY),
        ("Induction", _INDUCTION),
        ("Copying", _cliff(found)),
        *_fit_facts(found),
        ("Depth", _choice(found)),
    ]


def _fit_facts(found: Analysis) -> list[Fact]:
    if found.calibration is None:
        return []
    made = found.calibration
    return [("Fitted on", f"{made.name}: {made.n_tokens:,} tokens")]


def _choice(found: Analysis) -> str:
    """What the budget would take by these figures."""
    name, depth = found.budget.quality, found.chosen
    if depth is None or depth.quality is None:
        return f"no boundary that was measured is within the {name} budget"
    n_windows = depth.quality.n_windows
    how = "with the fit" if depth.fitted else "with the layers' own projections"
    return (
        f"{name} would take boundary {depth.boundary}, at most {depth.speedup_limit:.2f}x: "
        f"{_losses(depth.quality)} {how}; an estimate from {n_windows} "
        f"window{'s' * (n_windows > 1)}, `convert` measures more"
    )


def _losses(quality: Quality) -> str:
    retention = quality.induction_retention
    kept = "" if retention is None else f", {retention.value:.0%} of copying kept"
    kl, copy = _with_digits(quality.kl_mean, 4), quality.copy_ppl_ratio.value
    return f"KL {kl}, copy ratio {copy:.3f}{kept}"


def _gate_facts(gates: Importance) -> list[Fact]:
    windows = f"{gates.n_windows} windows of {gates.n_context} + {gates.n_answer} tokens"
    return [
        ("Importance", f"mean of (dL/dg)^2 ± one standard error over {windows}; bars: its root"),
        ("Reading", _thirds(gates.prefill)),
        ("Answering", _thirds(gates.decode)),
    ]


def _thirds(stage: Stage) -> str:
    times = "" if stage.median_ratio is None else f" ({_with_se(stage.median_ratio)} times)"
    return (
        f"median of the last third of the layers {_with_se(stage.last_third_median)}, of the others"
        f" {_with_se(stage.others_median)}{times}; means"
        f" {_with_se(stage.last_third_mean)} and {_with_se(stage.others_mean)}"
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


def _value(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}"


def _with_se(estimate: Estimate) -> str:
    return _with_digits(estimate, 2)


def _with_digits(estimate: Estimate, digits: int) -> str:
    value = f"{estimate.value:.{digits}f}"
    return value if estimate.se is None else f"{value} ± {estimate.se:.{digits}f}"
