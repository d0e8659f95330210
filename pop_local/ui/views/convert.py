"""The output of `convert` as text and JSON: the plan, the candidates, and the result."""

from collections.abc import Iterator, Sequence
from typing import Any

from pop_base.numbers import duration, size
from pop_converter.architecture.skipping import SkippableLayers, skipping_of
from pop_converter.architecture.work import LIMIT_PROMPT
from pop_converter.popfile.format import Budget, DeepRows, PopMeta
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import FileSizes
from pop_converter.popfile.sidecar import sidecar_path
from pop_converter.projection import Projection
from pop_local.measure.budget import FAST, limits_in_words
from pop_local.measure.verdict import verdict_in_words
from pop_local.ui.console import note, out
from pop_local.ui.tables import Column, Fact, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import bare, figures, with_advice
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


def _kind(plan: Plan) -> str:
    return f"{plan.projection}, distilled" if plan.is_distilled else plan.projection


def budget_fact(budget: Budget) -> Fact:
    return "Budget", f"{budget.quality} allows {limits_in_words(budget)}"


def show_trials(trials: Sequence[Trial]) -> None:
    print_table(_COLUMNS, trials)
    out.file.write("\n")


def show_plan(conversion: Conversion) -> None:
    facts = _planned_facts(conversion)
    if conversion.seconds is not None:
        facts.append(("Time", f"about {duration(conversion.seconds)} on this machine"))
    print_facts(facts)


def show_converted(conversion: Conversion, done: Converted) -> None:
    if done.trials:
        show_trials(done.trials)
    planned = _planned_facts(conversion)
    facts = _facts(conversion, done.plan, done.sizes, is_final=True)
    new = [fact for fact in facts if fact not in planned]
    print_facts([*new, *measured_facts(done.meta), ("Written", str(done.path))])
    if (measured := done.meta.measured) is not None:
        print_sentence(with_advice(verdict_in_words(measured)))
    if conversion.is_sidecar and done.path != sidecar_path(conversion.source):
        note(f"The sidecar is not next to the model, so pass it with --sidecar {done.path}.")


def plan_json(conversion: Conversion) -> dict[str, Any]:
    """Return a conversion's plans as a JSON object. A search tries one or more of the plans."""
    return _common(conversion, conversion.sizes) | {
        "distills": conversion.options.distiller is not None,
        "budget": conversion.budget,
        "seconds": conversion.seconds,
        "memory_bytes": conversion.needs and conversion.needs.sums_bytes,
        "plans": [_plan_json(conversion, plan) for plan in conversion.tried],
    }


def converted_json(conversion: Conversion, done: Converted) -> dict[str, Any]:
    """Return a result as a JSON object. `tried` contains all metrics of the measured candidates."""
    measured = done.meta.measured
    return {
        **_common(conversion, done.sizes),
        **_plan_json(conversion, done.plan),
        **fields_of(done.meta, "source_sha256", "calibration", "measured"),
        "verdict": measured and with_advice(verdict_in_words(measured)),
        "budget": done.plan.budget,
        "tried": [
            {
                **_plan_json(conversion, trial.plan),
                **figures(trial.quality),
                "lookups": trial.lookups and figures(trial.lookups),
                "in_budget": trial.in_budget,
            }
            for trial in done.trials
        ],
    }


def _common(conversion: Conversion, sizes: FileSizes) -> dict[str, Any]:
    shape = conversion.deepest.shape
    return {
        "source": str(conversion.path),
        "output": str(conversion.target),
        "form": conversion.options.output,
        "architecture": shape.arch,
        "n_layer": shape.n_layer,
        **fields_of(sizes, "source_bytes", "output_bytes"),
        "limit_n_prompt": LIMIT_PROMPT,
    }


def _plan_json(conversion: Conversion, plan: Plan) -> dict[str, Any]:
    return {
        **fields_of(plan, "boundary", "n_skipped", "schedule", "projection"),
        "distilled": plan.is_distilled,
        **fields_of(plan, "sink_tokens", "tail_tokens", "min_prompt", "deep_rows", "deep_share"),
        "speedup_limit": plan.speedup_limit,
    }


def _planned_facts(conversion: Conversion) -> list[Fact]:
    budget = [] if conversion.budget is None else [budget_fact(conversion.budget)]
    plan = _facts(conversion, conversion.deepest, conversion.sizes, is_final=conversion.is_named)
    return [*plan, *budget, *fit_facts(conversion)]


def _facts(
    conversion: Conversion, plan: Plan, sizes: FileSizes, *, is_final: bool
) -> Iterator[Fact]:
    """Describe a plan as labeled values. If it is not final, a search may skip fewer layers."""
    form, first = conversion.options.output, conversion.plans[0]
    up_to = "" if is_final else "up to "
    yield "Model", str(conversion.path)
    yield "Architecture", plan.shape.arch
    yield "Layers", f"{plan.shape.n_layer} (prompt tokens skip {up_to}{plan.n_skipped})"
    if is_final:
        yield "Boundary", f"layer {plan.boundary}"
        yield "Schedule", plan.schedule
    else:
        yield "Boundaries", ", ".join(str(plan.boundary) for plan in conversion.tried)
        if fewer := " and ".join(first.deep_rows.fewer):
            yield "Deep rows", f"'{first.deep_rows}' (the search may also try {fewer})"
    opened_by = "stock llama.cpp can also open the copy"
    if form == "sidecar":
        opened_by = "the model file stays unchanged"
    elif plan.projection != Projection.OWN:
        opened_by = "only pop-local can open the copy"
    yield "Skipped layers", f"K and V from {plan.projection} projections; {opened_by}"
    yield from skipping_facts(skipping_of(plan.shape))[1:]
    yield full_fact(plan)
    yield "Size", f"{size(sizes.source_bytes)}, {form} {up_to}{size(sizes.output_bytes)}"
    least = "" if is_final else f" ({first.speedup_limit:.2f}x with the fewest skipped layers)"
    no_deep = plan.deep_rows is not DeepRows.NONE and not plan.deep_share
    yield (
        "Speedup",
        f"up to {plan.speedup_limit:.2f}x{least} for {LIMIT_PROMPT:,} prompt tokens"
        f"{' without deep rows' if no_deep else ''}",
    )


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
    yield "Memory", f"{size(needs.sums_bytes)} for the fit's statistics"


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
