"""The output of `convert` as text and JSON: the plan, the candidates, and the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pop_base.numbers import duration, size
from pop_converter.architecture.skipping import skipping_of
from pop_converter.architecture.work import LIMIT_PROMPT
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.sidecar import sidecar_path
from pop_converter.projection import Projection
from pop_local.measure.budget import FAST, limits_in_words
from pop_local.measure.verdict import verdict_in_words
from pop_local.ui.console import note, out
from pop_local.ui.tables import Column, Fact, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import bare, figures, with_advice

if TYPE_CHECKING:
    from pop_converter.architecture.skipping import SkippableLayers
    from pop_converter.popfile.format import Budget, PopMeta
    from pop_converter.popfile.pruning_plan import Plan
    from pop_converter.popfile.rewrite import FileSizes
    from pop_local.workflows.conversion.conversion_plan import Conversion, Converted, Trial


_COLUMNS = (
    Column("Layer", lambda trial: trial.plan.boundary, numeric=True),
    Column("K/V", lambda trial: _kind(trial.plan)),
    Column("Limit", lambda trial: f"{trial.plan.speedup_limit:.2f}x", numeric=True),
    Column("KL", lambda trial: bare(trial.quality.kl_mean, ".4f"), numeric=True),
    Column("PPL", lambda trial: bare(trial.quality.ppl_ratio, ".3f"), numeric=True),
    Column("Copy", lambda trial: bare(trial.quality.copy_ppl_ratio, ".3f"), numeric=True),
    Column(
        "Lost",
        lambda trial: trial.lookups and f"{trial.lookups.lost} of {trial.lookups.full}",
        numeric=True,
    ),
    Column("Inside", lambda trial: "yes" if trial.in_budget else "no"),
)
# Names in `figures` of the values that a budget limits.
_JUDGED = (
    *("n_windows", "kl_mean", "kl_se", "ppl_ratio", "ppl_ratio_se", "copy_ppl_ratio"),
    "copy_ppl_ratio_se",
)


def _kind(plan: Plan) -> str:
    return f"{plan.projection}, distilled" if plan.is_distilled else plan.projection


def budget_fact(budget: Budget) -> Fact:
    return "Budget", f"{budget.quality} allows {limits_in_words(budget)}"


def show_trials(trials: Sequence[Trial]) -> None:
    print_table(_COLUMNS, trials)
    out.file.write("\n")


def trial_json(trial: Trial) -> dict[str, Any]:
    """Return a candidate as a JSON object, including all metrics that a budget can limit."""
    plan, quality = trial.plan, figures(trial.quality)
    return {
        **fields_of(plan, "boundary", "n_skipped", "projection"),
        "distilled": plan.is_distilled,
        **fields_of(plan, "deep_rows", "deep_share", "speedup_limit"),
        **{name: quality[name] for name in _JUDGED},
        "lookups": trial.lookups and figures(trial.lookups),
        "in_budget": trial.in_budget,
    }


def show_plan(conversion: Conversion) -> None:
    facts = _planned_facts(conversion)
    if conversion.seconds is not None:
        facts.append(("Time", f"about {duration(conversion.seconds)} on this machine"))
    print_facts(facts)


def _planned_facts(conversion: Conversion) -> list[Fact]:
    plan, first, limits = conversion.deepest, conversion.plans[0], conversion.budget
    budget = [] if limits is None else [budget_fact(limits)]
    fits = fit_facts(conversion)
    if conversion.is_named:
        return [*_plan_facts(conversion, plan, conversion.sizes), *budget, *fits]
    past = f"from {first.boundary} down to {plan.boundary}"
    if len(conversion.tried) < len(conversion.plans):
        past = ", ".join(str(candidate.boundary) for candidate in conversion.tried)
    where = [*budget, ("Boundaries", past)]
    if fewer := " and ".join(first.deep_rows.fewer):
        where.append(("Deep rows", f"'{first.deep_rows}' (the search may also try {fewer})"))
    limit = _limit(conversion, first, conversion.limit(plan))
    layers = f"up to {plan.n_skipped} layers if the budget allows"
    output = f"up to {size(conversion.sizes.output_bytes)}"
    return [*_facts(conversion, plan, layers, where, output, limit), *fits]


def show_converted(conversion: Conversion, done: Converted) -> None:
    if done.trials:
        show_trials(done.trials)
    planned = _planned_facts(conversion)
    new = [fact for fact in _plan_facts(conversion, done.plan, done.sizes) if fact not in planned]
    print_facts([*new, *measured_facts(done.meta), ("Written", str(done.path))])
    if (measured := done.meta.measured) is not None:
        print_sentence(with_advice(verdict_in_words(measured)))
    if conversion.is_sidecar and done.path != sidecar_path(conversion.source):
        note(f"The sidecar is not next to the model, so pass it with --sidecar {done.path}.")


def plan_json(conversion: Conversion) -> dict[str, Any]:
    """Return a plan, including all boundaries that a search may try, as a JSON object."""
    plans, limits = conversion.plans, conversion.budget
    distills = conversion.options.distiller is not None
    wished = replace(conversion.deepest, is_distilled=distills)
    budget = {"seconds": conversion.seconds} | ({} if limits is None else {"budget": limits})
    if conversion.is_named:
        return _object(conversion, wished, conversion.sizes, None) | budget
    plan = _common(conversion, wished) | {"most_output_bytes": conversion.sizes.output_bytes}
    return plan | {
        "boundaries": [plan.boundary for plan in conversion.tried],
        "least_speedup_limit": conversion.limit(plans[0]),
        "most_speedup_limit": conversion.limit(conversion.deepest),
        **budget,
    }


def converted_json(conversion: Conversion, done: Converted) -> dict[str, Any]:
    """Return a result as a JSON object that lists every boundary tried."""
    tried = [trial_json(trial) for trial in done.trials]
    result = _object(conversion, done.plan, done.sizes, done.meta)
    return result | {"tried": tried}


def _object(
    conversion: Conversion, plan: Plan, sizes: FileSizes, meta: PopMeta | None
) -> dict[str, Any]:
    return _common(conversion, plan) | {
        **fields_of(plan, "boundary", "n_skipped", "schedule"),
        "output_bytes": sizes.output_bytes,
        "speedup_limit": conversion.limit(plan),
        "source_sha256": meta and meta.source_sha256,
        "calibration": meta and meta.calibration,
        "measured": meta and meta.measured,
        "verdict": meta and meta.measured and with_advice(verdict_in_words(meta.measured)),
        "budget": plan.budget,
        "tried": (),
    }


def _common(conversion: Conversion, plan: Plan) -> dict[str, Any]:
    """Return the fields that all plans share. The memory estimate excludes distillation."""
    needs = conversion.needs
    return {
        "source": str(conversion.path),
        "output": str(conversion.target),
        "form": conversion.options.output,
        "architecture": plan.shape.arch,
        "n_layer": plan.shape.n_layer,
        "projection": plan.projection,
        "distilled": plan.is_distilled,
        **fields_of(plan, "sink_tokens", "tail_tokens", "min_prompt", "deep_rows", "deep_share"),
        "source_bytes": conversion.sizes.source_bytes,
        "limit_n_prompt": LIMIT_PROMPT,
        "memory_bytes": needs.total_bytes if needs else None,
    }


def _plan_facts(conversion: Conversion, plan: Plan, sizes: FileSizes) -> list[Fact]:
    where = [("Boundary", f"layer {plan.boundary}"), ("Schedule", plan.schedule)]
    output = size(sizes.output_bytes)
    return _facts(conversion, plan, str(plan.n_skipped), where, output, _limit(conversion, plan))


def _limit(conversion: Conversion, plan: Plan, most: float | None = None) -> str:
    """Describe a speedup limit. `most`: the limit when the most layers are skipped."""
    if conversion.not_counted:
        return f"unknown: {conversion.not_counted}"
    limit = f"up to {plan.speedup_limit:.2f}x"
    if most:
        least = f"the limit is {plan.speedup_limit:.2f}x if as few layers as possible are skipped"
        limit = f"up to {most:.2f}x ({least})"
    limit += f" for {LIMIT_PROMPT:,} prompt tokens"
    if plan.deep_rows is not DeepRows.NONE and not plan.deep_share:
        limit += " without deep rows"
    return limit


def _facts(
    conversion: Conversion, plan: Plan, layers: str, where: list[Fact], output: str, limit: str
) -> list[Fact]:
    """Describe a plan as labeled values. `where`: values to insert after the layer count."""
    form, read = conversion.options.output, size(conversion.sizes.source_bytes)
    opened_by = "stock llama.cpp can also open the copy"
    if form == "sidecar":
        opened_by = "the model file stays unchanged"
    elif plan.projection != Projection.OWN:
        opened_by = "only pop-local can open the copy"
    return [
        ("Model", str(conversion.path)),
        ("Architecture", plan.shape.arch),
        ("Layers", f"{plan.shape.n_layer} (prompt tokens skip {layers})"),
        *where,
        ("Skipped layers", f"K and V from {plan.projection} projections; {opened_by}"),
        *skipping_facts(skipping_of(plan.shape))[1:],
        full_fact(plan),
        ("Size", f"{read}, {form} {output}"),
        ("Speedup", limit),
    ]


def fit_facts(conversion: Conversion) -> Iterator[Fact]:
    """Describe the text for a planned fit, and the memory that the fit needs."""
    plan, fit, needs = conversion.deepest, conversion.fit, conversion.needs
    if fit is None or needs is None:
        return
    n_tokens, n = fit.n_tokens(plan.shape.n_embd), len(needs.groups)
    at_most = "" if conversion.is_named else "up to "
    passes = "one pass" if n == 1 else f"{at_most}{n} passes"
    distilled = ", then distilled" if conversion.options.distiller else ""
    yield "Fitted on", f"{fit.text_name}: {n_tokens:,} tokens in {passes}{distilled}"
    more = " without distilling" if conversion.options.distiller else ""
    total, sums = size(needs.total_bytes), size(needs.sums_bytes)
    yield "Memory", f"{total} in addition to the model file. {sums} of this is for the fit{more}."


def skipping_facts(skippable: SkippableLayers) -> list[Fact]:
    """Describe the skippable layers, and the values that are still computed in these layers."""
    layers = f"layers {skippable.first} to {skippable.last}"
    if skippable.exact:
        layers = f"{layers} (skipping layers {skippable.exact} and up causes no loss)"
    projections = f"own only: {skippable.no_fit}"
    if skippable.fits_from is not None:
        projections = "fitted or own"
        if skippable.fits_from > skippable.first:
            projections += f" (boundaries below {skippable.fits_from} require own projections)"
    measured = "real models" if skippable.is_measured else "random models only"
    return [
        ("Can be skipped", layers),
        ("Still computed", f"{' and '.join(skippable.left) or 'nothing'} of the skipped layers"),
        ("Projections", projections),
        ("Catching up", f"no: {skippable.no_refill}" if skippable.no_refill else "yes"),
        ("Measured on", measured),
    ]


def full_fact(rows: Plan | PopMeta) -> Fact:
    start = "token" if rows.sink_tokens == 1 else f"{rows.sink_tokens} tokens"
    ends = f"the first {start} and the last {rows.tail_tokens} tokens"
    if rows.deep_rows is DeepRows.NONE:
        return "Run all layers", ends
    words = f"words selected by the '{rows.deep_rows}' rule"
    if share := getattr(rows, "deep_share", 0.0):
        words += f" ({share:.0%} of ordinary text)"
    return "Run all layers", f"{ends}, and {words}"


def measured_facts(meta: PopMeta) -> Iterator[Fact]:
    """Describe a file's quality measurements. Yield nothing if the file contains none."""
    if (measured := meta.measured) is None:
        return
    kl, ratio = f"{measured.kl_mean:.4f} ± {measured.kl_se:.4f}", f"{measured.ppl_ratio:.3f}"
    top = f"{measured.top1_agreement:.1%} of tokens"
    yield "Quality", f"KL {kl}, perplexity ratio {ratio}; the top prediction is unchanged for {top}"
    ratio, right = f"{measured.copy_ppl_ratio:.3f}", f"{measured.copy_top1:.1%} of tokens"
    yield "Copying", f"perplexity ratio {ratio}; the top prediction is correct for {right}"
    if measured.copy_ppl_ratio > FAST.max_copy_ratio:
        most = FAST.max_copy_ratio
        yield "", f"BROKEN: with a ratio above {most:g}, a model cannot copy from its prompt"
    if measured.lookups_n:
        shares = f"{measured.lookups_lost} of {measured.lookups_full} lost"
        shares += f", {measured.lookups_gained} gained"
        yield "Look-ups", f"{shares} in {measured.lookups_n} questions"
        lost = f"{measured.lookups_logprob_lost:.2f} ± {measured.lookups_logprob_se:.2f}"
        yield "", f"the log-probability of each string drops by {lost} nats on average"
