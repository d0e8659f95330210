"""How the quality of pruning is shown: facts for one depth, a table for several, JSON, a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import PopError
from converter.output import check_output, replacing
from pop_local.ui.tables import Column, Fact, Table, markdown, print_facts
from pop_local.ui.theme import say

if TYPE_CHECKING:
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.needle import Needle
    from pop_local.measure.quality import Quality
    from pop_local.workflows.evaluate import Evaluation, Row


ALWAYS_SKIP = "always-skip"


def flat(row: Row) -> dict[str, Any]:
    """For JSON; the figures as in `figures`.

    `baseline`: null, or an object with the baseline's name and the same figures.
    """
    values: dict[str, Any] = {
        "n_skipped": row.n_skipped,
        "projection": row.projection,
        "calibration": row.calibration and asdict(row.calibration),
        "kv_type": row.kv_type and row.kv_type.value,
        "speedup_limit": row.speedup_limit,
        **figures(row.quality),
        "needle": None if row.needle is None else asdict(row.needle),
        "baseline": None,
    }
    if row.always_skip is not None:
        values["baseline"] = {"name": ALWAYS_SKIP, **figures(row.always_skip)}
    return values


def figures(quality: Quality) -> dict[str, Any]:
    """For JSON: each estimate as its value and NAME_se, but kl_se for kl_mean."""
    values: dict[str, Any] = {}
    for field in fields(quality):
        value = getattr(quality, field.name)
        if field.type in ("int", int):
            values[field.name] = value
            continue
        error = "kl_se" if field.name == "kl_mean" else f"{field.name}_se"
        values[field.name] = None if value is None else value.value
        values[error] = None if value is None else value.se
    return values


def facts(row: Row) -> list[Fact]:
    """Labels and values for one depth."""
    q = row.quality
    layers = f"{row.n_skipped} layers, from layer {q.boundary} on, {row.projection} projections"
    return [
        *_fitted_on(row),
        ("Skipped", f"{layers}; speed-up at most {row.speedup_limit:.2f}x"),
        ("Windows", f"{q.n_windows} of {q.n_context} + {q.n_continuation} tokens"),
        ("Tokens pruned", f"{q.n_pruned:,} of {q.n_windows * q.n_context:,} of context"),
        ("KL to full", f"mean {_with_se(q.kl_mean, 4)}, median {_with_se(q.kl_median, 4)}"),
        ("", f"99th percentile {_with_se(q.kl_p99, 3)}, first token {_with_se(q.kl_first, 3)}"),
        ("Perplexity", f"full {_with_se(q.ppl_full, 2)}, pruned {_with_se(q.ppl_pruned, 2)}"),
        ("", f"ratio {_with_se(q.ppl_ratio, 3)}"),
        ("Same first choice", _with_se(q.top1_agreement, 3)),
        ("Copying", f"perplexity ratio {_with_se(q.copy_ppl_ratio, 3)}"),
        (
            "",
            f"first choice right {_with_se(q.copy_top1, 3)}, full {_with_se(q.copy_top1_full, 3)}",
        ),
        ("Induction", f"NLL +{_with_se(q.induction_delta_nll, 3)}, {_retained(q)}"),
        ("Needle", _found(row.needle)),
    ]


def _fitted_on(row: Row) -> list[Fact]:
    if row.calibration is None:
        return []
    found = row.calibration
    how = f"ridge {found.ridge:g}, weighting {found.weighting}"
    stored = f", stored as {row.kv_type.value}" if row.kv_type else ""
    return [("Fitted on", f"{found.name}: {found.n_tokens:,} tokens, {how}{stored}")]


def table(rows: Sequence[Row]) -> Table:
    """One line for each depth, and one below it for its baseline."""
    lines = [line for row in rows for line in (row, _baseline(row)) if line is not None]
    columns: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
        ("n_skipped", "Skipped", lambda r: str(r.n_skipped)),
        ("projection", "K/V", lambda r: r.projection),
        ("speedup_limit", "Limit", _limit),
        ("ppl_ratio", "PPL ratio", lambda r: _with_se(r.quality.ppl_ratio, 3)),
        ("kl_mean", "KL mean", lambda r: _with_se(r.quality.kl_mean, 3)),
        ("kl_p99", "KL p99", lambda r: f"{r.quality.kl_p99.value:.2f}"),
        ("kl_first", "KL first", lambda r: _with_se(r.quality.kl_first, 3)),
        ("top1_agreement", "Top-1", lambda r: f"{r.quality.top1_agreement.value:.3f}"),
        ("copy_ppl_ratio", "Copy ratio", lambda r: _with_se(r.quality.copy_ppl_ratio, 2)),
        ("copy_top1", "Copy top-1", lambda r: f"{r.quality.copy_top1.value:.3f}"),
        ("induction_retention", "Induction", lambda r: _share(r.quality.induction_retention)),
        ("needle", "Needle full / pruned", lambda r: _hits(r.needle)),
    )
    return Table(
        tuple(Column(key, title, numeric=True) for key, title, _ in columns),
        tuple(tuple(show(line) for _, _, show in columns) for line in lines),
    )


def _baseline(row: Row) -> Row | None:
    """Its line; nothing attends in the skipped layers, so it does not matter what their K/V are."""
    if row.always_skip is None:
        return None
    return replace(row, projection=ALWAYS_SKIP, quality=row.always_skip, needle=None)


def _limit(row: Row) -> str:
    """Of pruning; the baseline's is another matter."""
    return "-" if row.projection == ALWAYS_SKIP else f"{row.speedup_limit:.2f}x"


def _with_se(estimate: Estimate, digits: int) -> str:
    value = f"{estimate.value:.{digits}f}"
    return value if estimate.se is None else f"{value} ± {estimate.se:.{digits}f}"


def _share(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.0%}"


def _retained(quality: Quality) -> str:
    if quality.induction_retention is None:
        return "but the full model does not copy random tokens either"
    return f"{_share(quality.induction_retention)} of the full model's gain"


def _hits(needle: Needle | None) -> str:
    if needle is None:
        return "-"
    return f"{needle.full_hits} / {needle.pruned_hits} of {needle.n}"


def _found(needle: Needle | None) -> str:
    if needle is None:
        return "not asked for"
    return f"answered {needle.pruned_hits} of {needle.n} pruned, {needle.full_hits} in full"


def require_plot(path: Path, model: Path, *, force: bool) -> None:
    """Refuse, before hours of measuring, what could not be drawn or must not be written.

    Raises PopError.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PopError(
            "--plot needs matplotlib", "install it with: pip install 'pop-local[plot]'"
        ) from error
    check_output(path, (model,) if model.exists() else (), 0, force=force)


def plot(rows: Sequence[Row], path: Path, *, force: bool) -> None:
    """Speed-up limit against mean KL and against the copy ratio, both logarithmic, as PNG.

    The baseline, where there is one, at the limit of the same depth.
    """
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda row: row.speedup_limit)
    limits = [row.speedup_limit for row in ordered]
    figure = Figure(figsize=(9, 4), layout="constrained")
    skipped = [row.n_skipped for row in ordered]
    always = [row.always_skip for row in ordered if row.always_skip is not None]
    lines = [("POP", [row.quality for row in ordered])] + [(ALWAYS_SKIP, always)] * bool(always)
    for axes, title, name in (
        (figure.add_subplot(1, 2, 1), "KL to the full model (nats)", "kl_mean"),
        (figure.add_subplot(1, 2, 2), "copy PPL ratio", "copy_ppl_ratio"),
    ):
        for label, qualities in lines:
            estimates: list[Estimate] = [getattr(quality, name) for quality in qualities]
            values = [estimate.value for estimate in estimates]
            errors = [estimate.se or 0.0 for estimate in estimates]
            axes.errorbar(limits, values, errors, marker="o", capsize=3, label=label)
            for n, limit, value in zip(skipped, limits, values, strict=True):
                axes.annotate(f"{n}", (limit, value), (4, 4), textcoords="offset points")
        axes.set(xlabel="speed-up limit", ylabel=title, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        if always:
            axes.legend()
    figure.suptitle("layers skipped by context tokens")
    with replacing(path, force=force) as file:
        figure.savefig(file, format="png", dpi=150)


def show_evaluation(found: Evaluation) -> None:
    """Facts for one depth; a table for several, or with a baseline."""
    path, text, first = str(found.model), found.text.name, found.rows[0]
    if len(found.rows) == 1 and first.always_skip is None:
        print_facts([("Model", path), ("Text", text), *facts(first)])
        return
    show_sweep(found)


def show_sweep(found: Evaluation) -> None:
    """A table with a row for each depth."""
    q = found.rows[0].quality
    lines = [
        f"{found.model}: {q.n_windows} windows of {q.n_context} + {q.n_continuation} tokens",
        f"{found.text.name}; ± one standard error",
        "",
        markdown(table(found.rows)),
    ]
    say("\n".join(lines))


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The only depth as one object."""
    return _json_head(found) | flat(found.rows[0])


def sweep_json(found: Evaluation) -> dict[str, Any]:
    """All depths, in a list of rows."""
    return _json_head(found) | {"rows": [flat(row) for row in found.rows]}


def _json_head(found: Evaluation) -> dict[str, Any]:
    text = found.text
    return {"model": str(found.model), "text": {"name": text.name, "sha256": text.sha256}}
