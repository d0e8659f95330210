"""A picture of an analysis: the importance of each layer, and what each depth costs and gains."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_converter.base.errors import PopError
from pop_converter.base.output import check_output, replacing
from pop_converter.projection import Projection
from pop_local.measure.estimate import Estimate
from pop_local.models.names import resolve_base
from pop_local.research.analyze import Analysis
from pop_local.research.depths import DepthCost
from pop_local.research.importance import Importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


_RANDOM = _Loss(
    "induction_retention",
    "Copying random tokens",
    "part of the full model's gain that is kept",
    "linear",
    "least_retention",
)
_LOSSES = (
    _Loss("kl_mean", "Prose", "KL to the full model (nats per token)", "log", "max_kl"),
    _Loss("copy_ppl_ratio", "Copying a passage", "perplexity ratio", "log", "max_copy_ratio"),
    _RANDOM,
)
_FORMATS = (".png", ".svg", ".pdf")
_PROJECTIONS = (
    (Projection.OWN, "own projections", "0.55"),
    (Projection.FITTED, "fitted", "tab:blue"),
)


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
            "a plot needs matplotlib", "install it with: pip install 'pop-local[plot]'"
        ) from error
    files: tuple[Path, ...] = ()
    with suppress(PopError):
        files = (resolve_base(model),)
    check_output(path, files, 0, force=force)


def plot_analysis(found: Analysis, path: Path, *, force: bool) -> None:
    """Draw the gates, if there are any, the KL, the copy ratio and the retention."""
    from matplotlib.figure import Figure

    gates = found.importance
    figure = Figure(figsize=(11, 8.4) if gates else (15, 4.6), layout="constrained")
    panels = list(figure.subplots(*((2, 2) if gates else (1, 3))).flat)
    if gates is not None:
        _draw_importance(panels.pop(0), gates, found)
    for axes, loss in zip(panels, _LOSSES, strict=True):
        _draw_loss(axes, loss, found)
    figure.suptitle(f"{found.model.name}: the need for each layer, and the cost of skipping it")
    with replacing(path, force=force) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip(".") or "png", dpi=130)


def _draw_importance(axes: "Axes", gates: Importance, found: Analysis) -> None:
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


def _draw_loss(axes: "Axes", loss: _Loss, found: Analysis) -> None:
    """Draw a line for each kind of projection, and name the points by their boundaries."""
    from matplotlib.ticker import LogLocator

    shown: dict[int, float] = {}
    for kind, label, color in _PROJECTIONS:
        points = [
            (depth, estimate)
            for depth in found.depths
            if (estimate := _estimate(depth, kind, loss))
            and (loss.scale == "linear" or estimate.value > _LEAST_SHOWN)
        ]
        limits = [depth.speedup_limit for depth, _ in points]
        _draw_line(axes, limits, [e for _, e in points], label, color=color)
        shown |= {depth.boundary: estimate.value for depth, estimate in points}
    for depth in found.depths:
        if depth.boundary in shown:
            at, color = (depth.speedup_limit, shown[depth.boundary]), _color(depth, found)
            axes.plot(*at, "o", color=color, zorder=3)
            axes.annotate(str(depth.boundary), at, (0, 6), textcoords="offset points", color=color)
    name, limit = found.budget.quality, getattr(found.budget, loss.limit)
    axes.axhline(limit, color="tab:green", ls="dashed", lw=1, label=f"{name} limit")
    if found.chosen is not None:
        label = f"{name}: boundary {found.chosen.boundary} (estimate)"
        axes.axvline(found.chosen.speedup_limit, color="tab:green", lw=1, label=label)
    axes.set(xlabel="speed-up limit (times)", ylabel=loss.unit, yscale=loss.scale)
    axes.set_title(f"{loss.title}, by boundary (red: the cliff of copying)", fontsize="medium")
    axes.yaxis.set_major_formatter("{x:g}")
    if loss.scale == "log":
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="small")


def _color(depth: DepthCost, found: Analysis) -> str:
    return "tab:green" if depth is found.chosen else "tab:red" if depth.is_cliff else "0.35"


def _estimate(depth: DepthCost, kind: Projection, loss: _Loss) -> Estimate | None:
    """With own or fitted projections; the retention of own ones is known of every boundary."""
    if kind is Projection.OWN and loss is _RANDOM:
        return depth.retention
    found: Estimate | None = None
    if depth.projection == kind:
        found = getattr(depth.quality, loss.figure)
    return found


def _draw_line(
    axes: "Axes", at: Sequence[float], estimates: Iterable[Estimate], label: str, **look: Any
) -> None:
    """Draw estimates with their errors, if there are any."""
    if at:
        values = [estimate.value for estimate in estimates]
        errors = [estimate.se or 0.0 for estimate in estimates]
        axes.errorbar(at, values, errors, label=label, markersize=4, capsize=2, **look)
