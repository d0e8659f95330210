"""Plot an analysis: the quality loss at each boundary against the speed-up."""

from contextlib import suppress
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.base.output_file import check_output, replacing
from pop_local.models.model_names import resolve
from pop_local.research.layer_analysis import Analysis

# Skipping only the last layer has a KL of 0, which a logarithmic axis cannot show.
_MIN_KL = 1e-4
_FORMATS = (".png", ".svg", ".pdf")


def require_plot(path: Path, model: str, *, force: bool) -> None:
    """Raise PopError if the plot cannot be drawn or written, before hours are spent measuring."""
    if path.suffix.lower() not in ("", *_FORMATS):
        raise PopError(
            f"{path} has an unknown plot format (supported formats: {', '.join(_FORMATS)})",
            f"rename the plot to {path.stem}.png",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PopError(
            "plotting requires matplotlib", "run: pip install 'pop-local[plot]'"
        ) from error
    files: tuple[Path, ...] = ()
    with suppress(PopError):
        files = (resolve(model, base=True),)
    check_output(path, files, 0, force=force)


def plot_analysis(found: Analysis, path: Path, *, force: bool) -> None:
    """Plot the KL at each measured boundary against its speed-up limit.

    The plot shows the budget's limit and, for each boundary, a labeled point with an error bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for depth in found.depths:
        if depth.quality is None or depth.quality.kl_mean.value <= _MIN_KL:
            continue
        color = "tab:green" if depth is found.chosen else "tab:red" if depth.is_cliff else "0.35"
        kl, at = depth.quality.kl_mean, (depth.speedup_limit, depth.quality.kl_mean.value)
        axes.errorbar(*at, kl.se or 0.0, fmt="o", capsize=2, color=color)
        axes.annotate(str(depth.boundary), at, (6, 6), textcoords="offset points", color=color)
    budget = found.budget
    label = f"{budget.quality} limit"
    axes.axhline(budget.max_kl, color="tab:green", ls="dashed", lw=1, label=label)
    if found.chosen is not None:
        label = f"{budget.quality}: boundary {found.chosen.boundary} (estimate)"
        axes.axvline(found.chosen.speedup_limit, color="tab:green", lw=1, label=label)
    axes.set(
        xlabel="speed-up limit (times)", ylabel="KL from the full model (nats/token)", yscale="log"
    )
    axes.set_title(
        "labels: boundary; red: the model can no longer copy from its prompt", fontsize="medium"
    )
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    figure.suptitle(f"{found.model.name}: loss and speed-up by boundary")
    with replacing(path, force=force) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip(".") or "png", dpi=130)
