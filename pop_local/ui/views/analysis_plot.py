"""An analysis as a picture: importance by layer, and each loss against the speed-up limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING

from converter.output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pop_local.measure.depth import Depth
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.importance import Importance
    from pop_local.measure.quality import Quality
    from pop_local.workflows.analyze import Analysis

# Skipping the last layer alone changes nothing, which a logarithm cannot show.
_LEAST_SHOWN = 1e-4


@dataclass(frozen=True)
class _Loss:
    """A figure to draw, on a scale that shows values above `least`; `limit`: of the budget.

    `own` and `fitted`: with which projections it was measured.
    """

    title: str
    unit: str
    scale: str
    least: float
    limit: float
    own: Callable[[Depth], Estimate | None]
    fitted: Callable[[Depth], Estimate | None]


def plot(found: Analysis, path: Path, *, force: bool) -> None:
    """As PNG: a panel for the gates, if there are any, the KL, the copy ratio and the retention."""
    from matplotlib.figure import Figure

    budget, gates = found.budget, found.importance
    losses = (
        _Loss(
            title="Prose",
            unit="KL to the full model (nats per token)",
            scale="log",
            least=_LEAST_SHOWN,
            limit=budget.max_kl,
            own=_figure(_own, lambda quality: quality.kl_mean),
            fitted=_figure(_fitted, lambda quality: quality.kl_mean),
        ),
        _Loss(
            title="Copying a passage",
            unit="perplexity, in the full model's",
            scale="log",
            least=_LEAST_SHOWN,
            limit=budget.max_copy_ratio,
            own=_figure(_own, lambda quality: quality.copy_ppl_ratio),
            fitted=_figure(_fitted, lambda quality: quality.copy_ppl_ratio),
        ),
        _Loss(
            title="Copying random tokens",
            unit="part of the full model's gain that is kept",
            scale="linear",
            least=-inf,
            limit=budget.least_retention,
            own=lambda depth: depth.retention,
            fitted=_figure(_fitted, lambda quality: quality.induction_retention),
        ),
    )
    size, shape = ((11.0, 8.4), (2, 2)) if gates else ((15.0, 4.6), (1, 3))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(*shape).flat)
    if gates is not None:
        _draw_importance(panels.pop(0), gates, found)
    for axes, loss in zip(panels, losses, strict=True):
        _draw_loss(axes, loss, found)
    figure.suptitle(f"{found.model.name}: what layers are needed for, and what skipping them costs")
    with replacing(path, force=force) as file:
        figure.savefig(file, format="png", dpi=130)


def _figure(
    quality_of: Callable[[Depth], Quality | None], figure: Callable[[Quality], Estimate | None]
) -> Callable[[Depth], Estimate | None]:
    def of(depth: Depth) -> Estimate | None:
        quality = quality_of(depth)
        return None if quality is None else figure(quality)

    return of


def _own(depth: Depth) -> Quality | None:
    return depth.own


def _fitted(depth: Depth) -> Quality | None:
    return depth.fitted


def _draw_importance(axes: Axes, gates: Importance, found: Analysis) -> None:
    from matplotlib.ticker import MaxNLocator

    stages = (
        ("reading (prefill)", gates.prefill, "o"),
        ("answering (decode)", gates.decode, "s"),
    )
    for name, stage, marker in stages:
        # Nothing reads what context takes from the last layer.
        shown = [(layer, e) for layer, e in enumerate(stage.layers) if e.value > _LEAST_SHOWN]
        axes.errorbar(
            [layer for layer, _ in shown],
            [estimate.value for _, estimate in shown],
            [estimate.se or 0.0 for _, estimate in shown],
            marker=marker,
            markersize=4,
            capsize=2,
            label=name,
        )
    n_layer = len(gates.prefill.layers)
    if found.chosen is not None:
        axes.axvspan(
            found.chosen.boundary - 0.5, n_layer - 0.5, color="tab:green", alpha=0.12, lw=0
        )
    axes.set(
        xlabel=f"layer (shaded: skipped within {found.budget.quality})",
        ylabel="importance, E[(dL/dg)²] (nats²)",
        yscale="log",
        title="Virtual gates: importance of each layer",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _draw_loss(axes: Axes, loss: _Loss, found: Analysis) -> None:
    from matplotlib.ticker import LogLocator

    own = _line(axes, found, loss.least, loss.own, "own projections", "0.55")
    fitted = _line(axes, found, loss.least, loss.fitted, "fitted", "tab:blue")
    axes.axhline(
        loss.limit, color="tab:green", ls="--", lw=1, label=f"{found.budget.quality} limit"
    )
    for depth in found.depths:
        value = own.get(depth.boundary, fitted.get(depth.boundary, nan))
        color = "tab:red" if depth.is_cliff else "0.35"
        axes.annotate(
            f"{depth.boundary}",
            (depth.speedup_limit, value),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            color=color,
        )
        if depth.is_cliff:
            axes.plot(depth.speedup_limit, value, "o", color=color, zorder=3)
    if found.chosen is not None:
        _mark(axes, found, own | fitted)
    axes.set(xlabel="speed-up limit (times)", ylabel=loss.unit, yscale=loss.scale)
    axes.set_title(f"{loss.title}, by boundary (red: the cliff of copying)", fontsize="medium")
    axes.yaxis.set_major_formatter("{x:g}")
    if loss.scale == "log":
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(0.06)
    axes.legend(fontsize="small")


def _line(
    axes: Axes,
    found: Analysis,
    least: float,
    figure: Callable[[Depth], Estimate | None],
    label: str,
    color: str,
) -> dict[int, float]:
    """Draws it, if there is any; returns the values by boundary."""
    shown = [
        (depth, estimate)
        for depth in found.depths
        if (estimate := figure(depth)) is not None and estimate.value > least
    ]
    if shown:
        axes.errorbar(
            [depth.speedup_limit for depth, _ in shown],
            [estimate.value for _, estimate in shown],
            [estimate.se or 0.0 for _, estimate in shown],
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
            color=color,
        )
    return {depth.boundary: estimate.value for depth, estimate in shown}


def _mark(axes: Axes, found: Analysis, values: dict[int, float]) -> None:
    """The chosen boundary."""
    chosen = found.chosen
    if chosen is None or chosen.boundary not in values:
        return
    axes.plot(
        chosen.speedup_limit,
        values[chosen.boundary],
        "*",
        color="tab:green",
        markersize=15,
        markeredgecolor="black",
        zorder=4,
        label=f"{found.budget.quality}: boundary {chosen.boundary} (estimate)",
    )
