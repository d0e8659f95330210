"""How an analysis is shown: a table with bars, the same as Markdown, JSON, a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_converter.format import OWN
from pop_converter.output import replacing
from rich.bar import Bar
from rich.table import Table as RichTable
from rich.text import Text as RichText

from pop_local.ui.quality import Row, flat
from pop_local.ui.tables import Column, Fact, Table, markdown, print_facts
from pop_local.ui.theme import out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pop_local.measure.depth import Depth
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.heldout import Text
    from pop_local.measure.importance import Importance, Stage

_BAR_WIDTH = 16
_WIDE_COLUMNS = 110
_LEAST_SHOWN = 1e-6


@dataclass(frozen=True)
class Analysis:
    """`importance` is None where the gates were left out; `depths` from the deepest layer on."""

    model: Path
    text: Text
    seed: int
    importance: Importance | None
    depths: tuple[Depth, ...]

    @property
    def cliff(self) -> tuple[Depth, ...]:
        return tuple(depth for depth in self.depths if depth.is_cliff)


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
    }


def _flat(depth: Depth) -> dict[str, Any]:
    values = flat(Row(depth.n_skipped, OWN, depth.speedup_limit, depth.quality, None))
    del values["needle"]
    return values | {"lost_retention": depth.lost_retention}


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
    Column("kl_mean", "KL", numeric=True),
    Column("copy_ppl_ratio", "Copy", numeric=True),
    Column("induction_retention", "Induction", numeric=True),
    Column("lost_retention", "Lost", numeric=True),
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
            row += [importance(stage.layers[layer]) for stage in (gates.prefill, gates.decode)]
        rows.append((*row, *_depth_cells(by_layer.get(layer))))
    columns = () if gates is None else _GATE_COLUMNS
    head = Column("layer", "Layer", numeric=True)
    return Table((head, *columns, *_DEPTH_COLUMNS), tuple(rows))


def _depth_cells(depth: Depth | None) -> tuple[str, ...]:
    if depth is None:
        return ("",) * len(_DEPTH_COLUMNS)
    quality = depth.quality
    retention, lost = quality.induction_retention, depth.lost_retention
    return (
        f"{depth.speedup_limit:.2f}x",
        f"{quality.kl_mean.value:.3f}",
        f"{quality.copy_ppl_ratio.value:.2f}",
        "-" if retention is None else f"{retention.value:.0%}",
        "-" if lost is None else f"{lost:.0%}",
    )


def _drawn(found: Analysis) -> RichTable:
    gates, is_wide = found.importance, out.width >= _WIDE_COLUMNS
    table = _table(found, _with_se if is_wide else _value)
    padding = (0, 2 if is_wide else 1, 0, 0)
    drawn = RichTable(header_style="title", box=None, padding=padding)
    with_bars = gates is not None and is_wide and _draws_blocks()
    for column in table.columns:
        drawn.add_column(column.title, justify="right", no_wrap=True)
        if with_bars and column in _GATE_COLUMNS:
            drawn.add_column("", width=_BAR_WIDTH)
    cliff = {str(depth.boundary) for depth in found.cliff}
    for cells in table.texts():
        style = "bad" if cells[0] in cliff else ""
        row: list[RichText | Bar] = [RichText(cell, style=style) for cell in cells]
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
    return [*facts, ("Copying", _cliff(found))]


def _gate_facts(gates: Importance) -> list[Fact]:
    windows = f"{gates.n_windows} windows of {gates.n_context} + {gates.n_answer} tokens"
    return [
        ("Importance", f"mean of (dL/dg)^2 ± one standard error over {windows}"),
        ("Reading", _thirds(gates.prefill)),
        ("Answering", _thirds(gates.decode)),
    ]


def _thirds(stage: Stage) -> str:
    return (
        f"last third of the layers {_with_se(stage.last_third)}, the others"
        f" {_with_se(stage.others)}: {stage.ratio.value:.2f} ± {stage.ratio.se or 0:.2f} times"
    )


def _cliff(found: Analysis) -> str:
    deepest = found.depths[-1]
    if deepest.lost_retention is None:
        return "the full model does not copy random tokens: induction says nothing here"
    if not found.cliff:
        return f"no single layer carries it, down to boundary {deepest.boundary}"
    layers = [f"{depth.boundary} (-{depth.lost_retention:.0%})" for depth in found.cliff]
    return f"lost with layer {' and '.join(layers)}, as a part of what the full model copies"


def _value(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}"


def _with_se(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ± {estimate.se or 0:.2f}"


def plot(found: Analysis, path: Path, *, force: bool) -> None:
    """Importance by layer, and KL and what is left of copying against the speed-up limit; PNG."""
    from matplotlib.figure import Figure

    n_panels = 2 if found.importance is None else 3
    figure = Figure(figsize=(5 * n_panels, 4.4), layout="constrained")
    panels = [figure.add_subplot(1, n_panels, number + 1) for number in range(n_panels)]
    if found.importance is not None:
        _plot_importance(panels.pop(0), found.importance)
    _plot_pareto(panels[0], found.depths, "kl_mean", "KL to the full model (nats)")
    _plot_pareto(panels[1], found.depths, "copy_ppl_ratio", "copy PPL ratio")
    figure.suptitle(f"{found.model.name}: what the layers are needed for, and what skipping costs")
    with replacing(path, force=force) as file:
        figure.savefig(file, format="png", dpi=150)


def _plot_importance(axes: Axes, gates: Importance) -> None:
    for name, stage, marker in (("reading", gates.prefill, "o"), ("answering", gates.decode, "s")):
        # Nothing reads what context takes from the last layer, which a logarithm cannot show.
        shown = [(layer, e) for layer, e in enumerate(stage.layers) if e.value > _LEAST_SHOWN]
        layers = [layer for layer, _ in shown]
        values = [estimate.value for _, estimate in shown]
        errors = [estimate.se or 0.0 for _, estimate in shown]
        axes.errorbar(layers, values, errors, marker=marker, markersize=4, capsize=2, label=name)
    axes.set(xlabel="layer", ylabel="importance, E[(dL/dg)²]", yscale="log", title="Virtual gates")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _plot_pareto(axes: Axes, depths: Sequence[Depth], name: str, title: str) -> None:
    # Skipping the last layer alone changes nothing, which a logarithm cannot show.
    shown = [depth for depth in depths if getattr(depth.quality, name).value > _LEAST_SHOWN]
    limits = [depth.speedup_limit for depth in shown]
    estimates: list[Estimate] = [getattr(depth.quality, name) for depth in shown]
    values = [estimate.value for estimate in estimates]
    axes.errorbar(limits, values, [e.se or 0.0 for e in estimates], marker="o", capsize=2)
    axes.set(xlabel="speed-up limit", ylabel=title, yscale="log")
    axes.set_title("by boundary; red: the layers of the cliff", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.margins(0.08)
    for depth, limit, value in zip(shown, limits, values, strict=True):
        color = "tab:red" if depth.is_cliff else "black"
        if depth.is_cliff:
            axes.plot(limit, value, "o", color=color, zorder=3)
        axes.annotate(
            f"{depth.boundary}", (limit, value), (-4, 7), textcoords="offset points", color=color
        )
