"""Pictures: what each depth costs against what it gains, and the importance of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_local.base.errors import PopError
from pop_local.base.output import check_output, replacing
from pop_local.models.names import resolve, resolve_base
from pop_local.ui.views.quality import ALWAYS_SKIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pop_local.measure.depth import DepthCost
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.importance import Importance
    from pop_local.workflows.analyze import Analysis
    from pop_local.workflows.evaluate import Row

# Skipping the last layer alone changes nothing, which a logarithm cannot show.
_LEAST_SHOWN = 1e-4


@dataclass(frozen=True)
class _Loss:
    """A figure of Quality on a panel of its own; `limit` is the field of Budget that bounds it."""

    figure: str
    title: str
    unit: str
    scale: str
    limit: str


_PROSE = _Loss("kl_mean", "Prose", "KL to the full model (nats per token)", "log", "max_kl")
_PASSAGE = _Loss(
    "copy_ppl_ratio",
    "Copying a passage",
    "perplexity, in the full model's",
    "log",
    "max_copy_ratio",
)
_RANDOM = _Loss(
    "induction_retention",
    "Copying random tokens",
    "part of the full model's gain that is kept",
    "linear",
    "least_retention",
)
_FORMATS = (".png", ".svg", ".pdf")
# Fields of DepthCost.
_PROJECTIONS = (("own", "own projections", "0.55"), ("fitted", "fitted", "tab:blue"))


def require_plot(path: Path, model: str, *, force: bool) -> None:
    """Refuse, before hours of measuring, what could not be drawn or must not be written.

    Raises PopError.
    """
    if path.suffix.lower() not in ("", *_FORMATS):
        raise PopError(
            f"{path} names no kind of plot that can be drawn", f"name it {path.stem}.png"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PopError(
            "--plot needs matplotlib", "install it with: pip install 'pop-local[plot]'"
        ) from error
    files: list[Path] = []
    for find in (resolve, resolve_base):
        with suppress(PopError):
            files.append(find(model))
    check_output(path, tuple(files), 0, force=force)


def plot_sweep(rows: Sequence[Row], path: Path, *, force: bool) -> None:
    """Draw mean KL and copy ratio against the speed-up limit, both logarithmic.

    The baseline, where there is one, stands at the limit of the same depth.
    """
    figure = _figure(9, 4)
    ordered = sorted(rows, key=lambda row: row.speedup_limit)
    for axes, loss in zip(figure.subplots(1, 2), (_PROSE, _PASSAGE), strict=True):
        for label, quality_of in (("POP", "quality"), (ALWAYS_SKIP, "always_skip")):
            shown = [row for row in ordered if getattr(row, quality_of) is not None]
            estimates = [getattr(getattr(row, quality_of), loss.figure) for row in shown]
            _draw_line(axes, [row.speedup_limit for row in shown], estimates, label)
            for row, estimate in zip(shown, estimates, strict=True):
                _name_point(axes, row.n_skipped, row.speedup_limit, estimate.value)
        _finish(axes, loss, loss.title)
    figure.suptitle("layers skipped by context tokens")
    _save(figure, path, force=force)


def plot_analysis(found: Analysis, path: Path, *, force: bool) -> None:
    """Draw the gates, if there are any, the KL, the copy ratio and the retention."""
    gates = found.importance
    figure = _figure(11, 8.4) if gates else _figure(15, 4.6)
    panels = list(figure.subplots(*((2, 2) if gates else (1, 3))).flat)
    if gates is not None:
        _draw_importance(panels.pop(0), gates, found)
    for axes, loss in zip(panels, (_PROSE, _PASSAGE, _RANDOM), strict=True):
        _draw_loss(axes, loss, found)
    figure.suptitle(f"{found.model.name}: what layers are needed for, and what skipping them costs")
    _save(figure, path, force=force)


def _draw_importance(axes: Axes, gates: Importance, found: Analysis) -> None:
    from matplotlib.ticker import MaxNLocator

    for stage, marker, label in (
        (gates.prefill, "o", "reading (prefill)"),
        (gates.decode, "s", "answering (decode)"),
    ):
        # Nothing reads what context takes from the last layer.
        shown = [(layer, e) for layer, e in enumerate(stage.layers) if e.value > _LEAST_SHOWN]
        _draw_line(axes, [n for n, _ in shown], [e for _, e in shown], label, marker=marker)
    if found.chosen is not None:
        first, n_layer = found.chosen.boundary, len(gates.prefill.layers)
        axes.axvspan(first - 0.5, n_layer - 0.5, color="tab:green", alpha=0.12, lw=0)
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
    values: dict[int, float] = {}
    for kind, label, color in _PROJECTIONS:
        least = _LEAST_SHOWN if loss.scale == "log" else -inf
        measured = [(depth, _estimate(depth, kind, loss)) for depth in found.depths]
        shown = [(depth, e) for depth, e in measured if e is not None and e.value > least]
        limits = [depth.speedup_limit for depth, _ in shown]
        _draw_line(axes, limits, [e for _, e in shown], label, color=color)
        for depth, estimate in shown:
            if depth.boundary not in values:
                color = "tab:red" if depth.is_cliff else "0.35"
                _name_point(axes, depth.boundary, depth.speedup_limit, estimate.value, color)
                if depth.is_cliff:
                    axes.plot(depth.speedup_limit, estimate.value, "o", color=color, zorder=3)
            values[depth.boundary] = estimate.value
    name, chosen = found.budget.quality, found.chosen
    limit = getattr(found.budget, loss.limit)
    axes.axhline(limit, color="tab:green", ls="--", lw=1, label=f"{name} limit")
    if chosen is not None and chosen.boundary in values:
        axes.plot(
            chosen.speedup_limit,
            values[chosen.boundary],
            "*",
            color="tab:green",
            markersize=15,
            markeredgecolor="black",
            zorder=4,
            label=f"{name}: boundary {chosen.boundary} (estimate)",
        )
    _finish(axes, loss, f"{loss.title}, by boundary (red: the cliff of copying)")


def _estimate(depth: DepthCost, kind: str, loss: _Loss) -> Estimate | None:
    """With own or fitted projections; the retention of own ones is known of every boundary."""
    if kind == "own" and loss is _RANDOM:
        return depth.retention
    found: Estimate | None = getattr(getattr(depth, kind), loss.figure, None)
    return found


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_line(
    axes: Axes, at: Sequence[float], estimates: Iterable[Estimate], label: str, **look: Any
) -> None:
    """Draws estimates with their errors, if there are any."""
    if at:
        values = [estimate.value for estimate in estimates]
        errors = [estimate.se or 0.0 for estimate in estimates]
        look = {"marker": "o", "markersize": 4, "capsize": 2, "label": label, **look}
        axes.errorbar(at, values, errors, **look)


def _name_point(axes: Axes, name: int, x: float, y: float, color: str = "0.35") -> None:
    axes.annotate(
        str(name), (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=color
    )


def _finish(axes: Axes, loss: _Loss, title: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(xlabel="speed-up limit (times)", ylabel=loss.unit, yscale=loss.scale)
    axes.set_title(title, fontsize="medium")
    axes.yaxis.set_major_formatter("{x:g}")
    if loss.scale == "log":
        low, high = axes.get_ylim()
        subs = (2, 5) if high > 10 * low else (1.2, 1.5, 2, 3, 5)
        axes.yaxis.set_minor_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(0.06)
    axes.legend(fontsize="small")


def _save(figure: Figure, path: Path, *, force: bool) -> None:
    with replacing(path, force=force) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip(".") or "png", dpi=130)
