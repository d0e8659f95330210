"""What `convert` prints of a conversion: facts for people, one object for --json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.format import FITTED, Budget, Calibration, Measured, PopMeta
from converter.macs import LIMIT_PROMPT, speedup_limit
from converter.plan import Plan
from converter.rewrite import Sizes
from converter.sidecar import sidecar_path
from pop_local.commands.converting import Job
from pop_local.commands.examining import measured_facts
from pop_local.commands.fitting import fit_needs
from pop_local.commands.forms import SIDECAR, Form
from pop_local.ui.tables import Fact, print_facts, print_json, size
from pop_local.ui.theme import note
from pop_local.ui.views.trials import Trial, budget_fact

_HOW = "first without a fit, then those near the budget as they will be used"


@dataclass(frozen=True)
class _Conversion:
    """What is known of a conversion whatever its depth."""

    source: str
    output: str
    form: str
    architecture: str
    n_layer: int
    projection: str
    sink_tokens: int
    tail_tokens: int
    min_prompt: int
    source_bytes: int


@dataclass(frozen=True)
class Report(_Conversion):
    """What `--json` prints; `source_sha256` is None when nothing was written.

    `memory_bytes`: the most that a fit takes, the model included; None without one.
    `tried`: what a budget's search measured, deepest last; empty where the user named the depth.
    """

    boundary: int
    n_skipped: int
    schedule: str
    output_bytes: int
    memory_bytes: int | None
    limit_n_prompt: int
    speedup_limit: float
    source_sha256: str | None
    calibration: Calibration | None
    measured: Measured | None
    budget: Budget | None
    tried: tuple[Trial, ...]


@dataclass(frozen=True)
class SearchPlan(_Conversion):
    """What `--json --dry-run` prints of a search: the boundaries that may be chosen."""

    boundaries: tuple[int, ...]
    most_output_bytes: int
    most_speedup_limit: float
    budget: Budget


def limit(plan: Plan) -> float:
    """The speed-up that it can reach at most."""
    n_full = plan.sink_tokens + plan.tail_tokens
    return speedup_limit(plan.shape, LIMIT_PROMPT, plan.boundary, n_full)


def _opened_by(plan: Plan, form: Form) -> str:
    if form is SIDECAR:
        return "the model itself stays as it is, for any program"
    if plan.projection == FITTED:
        return "the copy opens in pop-local only, since stock llama.cpp refuses added tensors"
    return "stock llama.cpp opens the copy, too"


def facts(plan: Plan, job: Job, sizes: Sizes) -> list[Fact]:
    layers = str(plan.n_skipped)
    depth = [("Boundary", f"layer {plan.boundary}"), ("Schedule", plan.schedule)]
    return _facts(plan, job, sizes.source_bytes, layers, depth, size(sizes.output_bytes))


def search_facts(plans: Sequence[Plan], budget: Budget, job: Job, sizes: Sizes) -> list[Fact]:
    """`plans` from the shallowest on; `sizes` of the deepest."""
    first, last = plans[0], plans[-1]
    layers = f"as many as the budget allows, {last.n_skipped} at most"
    depth = [
        budget_fact(budget),
        ("Boundaries", f"bisected from {first.boundary} down to {last.boundary}: {_HOW}"),
    ]
    output = f"up to {size(sizes.output_bytes)}"
    return _facts(last, job, sizes.source_bytes, layers, depth, output)


def _facts(
    plan: Plan, job: Job, source_bytes: int, layers: str, depth: list[Fact], output: str
) -> list[Fact]:
    """`layers` are skipped, `depth` says why or where, and what is written takes `output`."""
    return [
        ("Model", str(job.path)),
        ("Architecture", plan.shape.arch),
        ("Layers", f"{plan.shape.n_layer}, of which context tokens skip {layers}"),
        *depth,
        ("K/V of skipped", f"{plan.projection} projections; {_opened_by(plan, job.form)}"),
        ("Always in full", f"the first {plan.sink_tokens} and last {plan.tail_tokens} tokens"),
        ("Size", f"{size(source_bytes)}, {job.form.name} {output}"),
        ("Speed-up", f"at most {limit(plan):.2f}x for a prompt of {LIMIT_PROMPT:,} tokens"),
    ]


def show_written(
    plan: Plan,
    job: Job,
    sizes: Sizes,
    meta: PopMeta | None,
    tried: tuple[Trial, ...],
    *,
    json: bool,
) -> None:
    """The last lines, or the object; `meta` None when nothing was written."""
    if json:
        print_json(_report(plan, job, sizes, meta, tried))
    elif meta is not None:
        quality = measured_facts(meta.measured) if meta.measured else []
        print_facts([*quality, ("Written", str(job.target))])
        if job.form is SIDECAR and job.target != sidecar_path(job.source):
            note(f"It is looked for beside the model only: open it with --pop {job.target}.")


def _report(
    plan: Plan, job: Job, sizes: Sizes, meta: PopMeta | None, tried: tuple[Trial, ...]
) -> Report:
    is_fitted = plan.projection == FITTED
    needs = fit_needs((plan,), job.source, job.options) if is_fitted else None
    return Report(
        **_conversion(plan, job, sizes),
        boundary=plan.boundary,
        n_skipped=plan.n_skipped,
        schedule=plan.schedule,
        output_bytes=sizes.output_bytes,
        memory_bytes=needs.total_bytes if needs else None,
        limit_n_prompt=LIMIT_PROMPT,
        speedup_limit=limit(plan),
        source_sha256=meta.source_sha256 if meta else None,
        calibration=meta.calibration if meta else None,
        measured=meta.measured if meta else None,
        budget=plan.budget,
        tried=tried,
    )


def search_plan(plans: Sequence[Plan], budget: Budget, job: Job, sizes: Sizes) -> SearchPlan:
    """As `search_facts`."""
    last = plans[-1]
    return SearchPlan(
        **_conversion(last, job, sizes),
        boundaries=tuple(plan.boundary for plan in plans),
        most_output_bytes=sizes.output_bytes,
        most_speedup_limit=limit(last),
        budget=budget,
    )


def _conversion(plan: Plan, job: Job, sizes: Sizes) -> dict[str, Any]:
    return vars(
        _Conversion(
            source=str(job.path),
            output=str(job.target),
            form=job.form.name,
            architecture=plan.shape.arch,
            n_layer=plan.shape.n_layer,
            projection=plan.projection,
            sink_tokens=plan.sink_tokens,
            tail_tokens=plan.tail_tokens,
            min_prompt=plan.min_prompt,
            source_bytes=sizes.source_bytes,
        )
    )
