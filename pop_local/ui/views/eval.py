"""Format the measured quality of pruned models as a table or as JSON."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pop_converter.popfile.format import DeepRows
from pop_local.measure.estimate import Estimate
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality
from pop_local.ui.tables import Fact, fields_of, print_facts
from pop_local.workflows.eval import Evaluation


def with_se(estimate: Estimate | None, spec: str) -> str:
    """Format an estimate with its standard error, if the error is known."""
    error = "" if estimate is None or estimate.se is None else f" ± {estimate.se:{spec}}"
    return bare(estimate, spec) + error


def bare(estimate: Estimate | None, spec: str) -> str:
    """Format an estimate without its standard error."""
    return "-" if estimate is None else format(estimate.value, spec)


def figures(quality: Quality | Lookups) -> dict[str, Any]:
    """Return a JSON object. NAME_se is the standard error of NAME, but kl_se belongs to kl_mean."""
    values: dict[str, Any] = {}
    for field in fields(quality):
        value = getattr(quality, field.name)
        if value is not None and not hasattr(value, "se"):
            values[field.name] = value
            continue
        error = "kl_se" if field.name == "kl_mean" else f"{field.name}_se"
        values[field.name] = None if value is None else value.value
        values[error] = None if value is None else value.se
    return values


def with_advice(verdict: str) -> str:
    """Return a verdict followed by advice to use --full."""
    return f"{verdict} Use --full to avoid any loss."


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation's figures and verdict as a JSON object."""
    return {
        "model": str(evaluation.model),
        "text": {"name": evaluation.text.name},
        **fields_of(evaluation, "n_skipped", "projection", "speedup_limit"),
        **figures(evaluation.quality),
        "deep_rows": evaluation.deep_rows,
        "lookups": evaluation.lookups and figures(evaluation.lookups),
        "verdict": with_advice(evaluation.verdict),
    }


def show_evaluation(evaluation: Evaluation) -> None:
    print_facts([*_facts(evaluation), ("Verdict", with_advice(evaluation.verdict))])


def _facts(evaluation: Evaluation) -> Iterator[Fact]:
    q = evaluation.quality
    yield "Model", str(evaluation.model)
    yield "Text", evaluation.text.name
    layers = f"context tokens skip {evaluation.n_skipped} layers (from layer {q.boundary} up)"
    layers += f" and use {evaluation.projection} projections"
    if evaluation.deep_rows is not DeepRows.NONE:
        layers = f"{layers} and deep rows selected by the '{evaluation.deep_rows}' rule"
    yield "Skipped", f"{layers}; the speedup is up to {evaluation.speedup_limit:.2f}x"
    yield "Windows", f"{q.n_windows} of {q.n_context} + {q.n_continuation} tokens"
    yield "With fast reading", f"{q.n_pruned:,} of {q.n_windows * q.n_context:,} context tokens"
    yield "KL to full", f"mean {with_se(q.kl_mean, '.4f')}, median {with_se(q.kl_median, '.4f')}"
    p99, first = with_se(q.kl_p99, ".3f"), with_se(q.kl_first, ".3f")
    yield "", f"99th percentile: {p99}; first continuation token: {first}"
    full, pruned = with_se(q.ppl_full, ".2f"), with_se(q.ppl_pruned, ".2f")
    yield "Perplexity", f"full {full}, fast {pruned}"
    yield "", f"ratio {with_se(q.ppl_ratio, '.3f')}"
    yield "Same top prediction", with_se(q.top1_agreement, ".3f")
    yield "Copying", f"perplexity ratio {with_se(q.copy_ppl_ratio, '.3f')}"
    right, right_full = with_se(q.copy_top1, ".3f"), with_se(q.copy_top1_full, ".3f")
    yield "", f"top-1 accuracy: {right_full} with full reading, {right} with fast reading"
    retained = "but the full model cannot copy random tokens either"
    if (kept := q.induction_retention) is not None:
        retained = f"fast reading retains {kept.value:.0%} of the full model's gain from repetition"
    added = with_se(q.induction_delta_nll, ".3f")
    yield "Induction", f"NLL {'' if added.startswith('-') else '+'}{added}, {retained}"
    if (lookups := evaluation.lookups) is not None:
        counts = f"{lookups.full} of {lookups.n} correct with full reading"
        yield "Look-ups", f"{counts}, {lookups.pruned} with fast reading"
        yield "", f"{lookups.lost} lost, {lookups.gained} gained, p = {lookups.p:.2g}"
        full, lost = with_se(lookups.logprob_full, ".2f"), with_se(lookups.logprob_lost, ".2f")
        yield "", f"log-probability of correct strings: {full} with full reading"
        yield "", f"with fast reading, the log-probability is lower by {lost}"
