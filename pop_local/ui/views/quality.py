"""How the quality of pruning is shown: facts for one boundary, a table for several, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from pop_local.ui.tables import Column, Fact, markdown, print_facts
from pop_local.ui.theme import say

if TYPE_CHECKING:
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.heldout import Text
    from pop_local.measure.quality import Quality
    from pop_local.measure.recall import Recall
    from pop_local.workflows.evaluate import Evaluation, Row

ALWAYS_SKIP = "always-skip"


def with_se(estimate: Estimate | None, spec: str) -> str:
    """A value in this format, and its standard error where it is known."""
    error = "" if estimate is None or estimate.se is None else f" ± {estimate.se:{spec}}"
    return bare(estimate, spec) + error


def bare(estimate: Estimate | None, spec: str) -> str:
    """The value alone, in this format."""
    return "-" if estimate is None else format(estimate.value, spec)


def figures(quality: Quality | Recall) -> dict[str, Any]:
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


def text_json(text: Text) -> dict[str, str]:
    return {"name": text.name, "sha256": text.sha256}


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The only boundary as one object."""
    return _json_head(found) | _row_json(found.rows[0])


def sweep_json(found: Evaluation) -> dict[str, Any]:
    """All boundaries, in a list of rows."""
    return _json_head(found) | {"rows": [_row_json(row) for row in found.rows]}


def _json_head(found: Evaluation) -> dict[str, Any]:
    return {"model": str(found.model), "text": text_json(found.text)}


def _row_json(row: Row) -> dict[str, Any]:
    always = row.always_skip
    return {
        "n_skipped": row.n_skipped,
        "projection": row.projection,
        "calibration": row.calibration,
        "kv_type": row.kv_type,
        "speedup_limit": row.speedup_limit,
        **figures(row.quality),
        "select": row.select,
        "n_refilled": row.n_refilled,
        "recall": [figures(recall) for recall in row.recall],
        "baseline": None if always is None else {"name": ALWAYS_SKIP, **figures(always)},
    }


def show_evaluation(found: Evaluation) -> None:
    """Facts for one boundary; a table for several, or with a baseline."""
    if len(found.rows) > 1 or found.rows[0].always_skip is not None:
        show_sweep(found)
        return
    model, text = ("Model", str(found.model)), ("Text", found.text.name)
    print_facts([model, text, *_facts(found.rows[0])])


def show_sweep(found: Evaluation) -> None:
    """A table with a row for each boundary, and one below it for its baseline."""
    q = found.rows[0].quality
    rows = [line for row in found.rows for line in (row, *_baseline(row))]
    say(f"{found.model}: {q.n_windows} windows of {q.n_context} + {q.n_continuation} tokens")
    say(f"{found.text.name}; ± one standard error\n\n{markdown(_COLUMNS, rows)}")


def _facts(row: Row) -> Iterator[Fact]:
    q, made = row.quality, row.calibration
    if made is not None:
        how = f"{made.n_tokens:,} tokens, ridge {made.ridge:g}, weighting {made.weighting}"
        if made.n_distilled:
            how += f", distilled on {made.n_distilled:,} tokens"
        stored = f", stored as {row.kv_type.value}" if row.kv_type else ""
        yield "Fitted on", f"{made.name}: {how}{stored}"
    layers = f"{row.n_skipped} layers, from layer {q.boundary} on, {row.projection} projections"
    if row.select:
        layers += f", {row.select:.0%} of the rows selected"
    if row.n_refilled:
        layers += f", {row.n_refilled} rows refilled with each token that follows"
    yield "Skipped", f"{layers}; speed-up at most {row.speedup_limit:.2f}x"
    yield "Windows", f"{q.n_windows} of {q.n_context} + {q.n_continuation} tokens"
    yield "Tokens pruned", f"{q.n_pruned:,} of {q.n_windows * q.n_context:,} of context"
    yield "KL to full", f"mean {with_se(q.kl_mean, '.4f')}, median {with_se(q.kl_median, '.4f')}"
    p99, first = with_se(q.kl_p99, ".3f"), with_se(q.kl_first, ".3f")
    yield "", f"99th percentile {p99}, first token {first}"
    full, pruned = with_se(q.ppl_full, ".2f"), with_se(q.ppl_pruned, ".2f")
    yield "Perplexity", f"full {full}, pruned {pruned}"
    yield "", f"ratio {with_se(q.ppl_ratio, '.3f')}"
    yield "Same first choice", with_se(q.top1_agreement, ".3f")
    yield "Copying", f"perplexity ratio {with_se(q.copy_ppl_ratio, '.3f')}"
    right, right_full = with_se(q.copy_top1, ".3f"), with_se(q.copy_top1_full, ".3f")
    yield "", f"first choice right {right}, full {right_full}"
    retained = "but the full model does not copy random tokens either"
    if q.induction_retention is not None:
        retained = f"{q.induction_retention.value:.0%} of the full model's gain"
    added = with_se(q.induction_delta_nll, ".3f")
    yield "Induction", f"NLL {'' if added.startswith('-') else '+'}{added}, {retained}"
    for recall in row.recall:
        found, in_full = with_se(recall.exact_pruned, ".0%"), with_se(recall.exact_full, ".0%")
        yield f"Recall at {recall.n_tokens:,}", f"{found} of the facts, in full {in_full}"


def _baseline(row: Row) -> list[Row]:
    """Its line; nothing attends in the skipped layers, so it does not matter what their K/V are."""
    if row.always_skip is None:
        return []
    # The limit is of pruning.
    skipped = replace(row, projection=ALWAYS_SKIP, speedup_limit=nan, quality=row.always_skip)
    return [replace(skipped, recall=())]


def _recalled(row: Row) -> str:
    shares = (f"{r.exact_full.value:.0%} / {r.exact_pruned.value:.0%}" for r in row.recall)
    return ", ".join(shares) or "-"


def estimate_column(
    name: str, title: str, spec: str, show: Callable[[Estimate | None, str], str] = with_se
) -> Column:
    """A column of this estimate in a row's quality."""
    return Column(title, lambda row: show(getattr(row.quality, name), spec), numeric=True)


_COLUMNS = (
    Column("Skipped", lambda row: row.n_skipped, numeric=True),
    Column("K/V", lambda row: row.projection, numeric=True),
    Column(
        "Limit",
        lambda row: "-" if isnan(row.speedup_limit) else f"{row.speedup_limit:.2f}x",
        numeric=True,
    ),
    estimate_column("ppl_ratio", "PPL ratio", ".3f"),
    estimate_column("kl_mean", "KL mean", ".3f"),
    estimate_column("kl_p99", "KL p99", ".2f", bare),
    estimate_column("kl_first", "KL first", ".3f"),
    estimate_column("top1_agreement", "Top-1", ".3f", bare),
    estimate_column("copy_ppl_ratio", "Copy ratio", ".2f"),
    estimate_column("copy_top1", "Copy top-1", ".3f", bare),
    estimate_column("induction_retention", "Induction", ".0%", bare),
    Column("Recall full / pruned", _recalled, numeric=True),
)
