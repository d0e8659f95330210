"""`pop-local convert IN.gguf [OUT.gguf]`: write the model with its pruning schedule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pop_converter.errors import PlanError
from pop_converter.format import FITTED, Calibration, Measured, PopMeta
from pop_converter.plan import DEFAULT_SKIP, Plan, Skip, make_plan, parse_skip
from pop_converter.rewrite import Sizes, check_target
from pop_converter.shape import source_shape
from pop_converter.source import read_source

from pop_local.commands.converting import fit_and_write
from pop_local.commands.examining import measured_facts
from pop_local.commands.fitting import (
    FitOptions,
    KvTypeOption,
    Memory,
    ProjectionName,
    Ridge,
    Tokens,
    WeightingOption,
    fit_facts,
)
from pop_local.commands.forms import COPY, SIDECAR, Form
from pop_local.commands.options import GpuLayers, Threads
from pop_local.measure.limit import speedup_limit, with_min_prompt
from pop_local.models import resolve_base
from pop_local.ui.tables import Fact, print_facts, print_json, size

# Long enough that the full rows hardly count, short enough for a question about a document.
LIMIT_PROMPT = 2048
STATE_SUFFIX = ".calibration"


@dataclass(frozen=True)
class Report:
    """What `--json` prints; `source_sha256` is None when nothing was written."""

    source: str
    output: str
    form: str
    architecture: str
    n_layer: int
    boundary: int
    n_skipped: int
    schedule: str
    projection: str
    sink_tokens: int
    tail_tokens: int
    min_prompt: int
    source_bytes: int
    output_bytes: int
    limit_n_prompt: int
    speedup_limit: float
    source_sha256: str | None
    calibration: Calibration | None
    measured: Measured | None


def convert(
    model: Annotated[str, typer.Argument(metavar="IN.gguf", help="A model, or its first part.")],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.gguf", help="Default: IN.pop.gguf beside it."),
    ] = None,
    skip: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help=f"Layers to skip: 1/3, 0.33, or a number. Default: {DEFAULT_SKIP}"
        ),
    ] = None,
    boundary: Annotated[
        int | None,
        typer.Option(metavar="LAYER", help="The first layer to skip, instead of --skip."),
    ] = None,
    sink: Annotated[
        int, typer.Option(min=0, help="First tokens of a prompt to run in full.")
    ] = PopMeta.sink_tokens,
    tail: Annotated[
        int, typer.Option(min=0, help="Last tokens of a prompt to run in full.")
    ] = PopMeta.tail_tokens,
    min_prompt: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Shorter prompts run in full. Default: those that save less than half of what"
            " long ones save, about 40.",
        ),
    ] = None,
    projection: Annotated[
        ProjectionName,
        typer.Option(
            help="K/V of skipped layers: fitted to the model (takes minutes), or their own (takes"
            " seconds, loses more quality)."
        ),
    ] = ProjectionName.FITTED,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Text to fit on. Default: Python's documentation and samples of the model.",
        ),
    ] = None,
    tokens: Tokens = None,
    kv_type: KvTypeOption = None,
    ridge: Ridge = None,
    weighting: WeightingOption = None,
    memory: Memory = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep the fit when it is stopped, and go on with a kept one."
        ),
    ] = False,
    sidecar: Annotated[
        bool,
        typer.Option(
            "--sidecar", help="Write only what is new, into a small file beside the model."
        ),
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = -1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    allow_broken_copy: Annotated[
        bool,
        typer.Option(
            "--allow-broken-copy", help="Keep a fit that can no longer copy from its prompt."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace an existing output.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a copy of a model that reads long prompts faster.

    The weights stay as they are. The K/V projections of the skipped layers are fitted to the model
    and added, so that only pop-local opens the copy; what that leaves of the model's quality is
    measured, printed and stored. With --projection own nothing is added, and stock llama.cpp opens
    the copy too (and runs it in full). With --sidecar the model itself stays the file to open, here
    and elsewhere.
    """
    share = _share(skip, boundary)
    path = resolve_base(model)
    source = read_source(path)
    plan = make_plan(
        source_shape(source),
        skip=share,
        boundary=boundary,
        sink_tokens=sink,
        tail_tokens=tail,
        min_prompt=min_prompt,
        projection=projection.value,
    )
    if min_prompt is None:
        plan = with_min_prompt(plan)
    form = SIDECAR if sidecar else COPY
    target = output or form.default_path(source)
    options = FitOptions(
        tokens=tokens,
        text=text,
        kv_type=kv_type,
        ridge=ridge,
        weighting=weighting,
        memory_gb=memory,
        state_path=target.with_name(f".{target.name}{STATE_SUFFIX}") if resume else None,
    )
    if projection is ProjectionName.OWN:
        options.require_none("--projection own fits nothing")
    sizes = form.measure(plan, path, options.stored_type.value)
    if not json:
        facts = fit_facts((plan,), source, options) if plan.projection == FITTED else []
        print_facts([*_facts(path, plan, form, sizes), *facts])
    meta = None
    if not dry_run:
        check_target(path, target, sizes, force=force)
        meta = fit_and_write(
            plan,
            source,
            target,
            options,
            form=form,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            allow_broken_copy=allow_broken_copy,
            force=force,
        )
    if json:
        print_json(_report(path, target, plan, form, sizes, meta))
    elif meta is not None:
        quality = measured_facts(meta.measured) if meta.measured else []
        print_facts([*quality, ("Written", str(target))])


def _share(skip: str | None, boundary: int | None) -> Skip:
    if skip is None:
        return DEFAULT_SKIP
    if boundary is not None:
        raise typer.BadParameter("give one of --skip and --boundary", param_hint="--boundary")
    try:
        return parse_skip(skip)
    except PlanError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}", param_hint="--skip") from error


def _limit(plan: Plan) -> float:
    n_full = plan.sink_tokens + plan.tail_tokens
    return speedup_limit(plan.shape, LIMIT_PROMPT, plan.boundary, n_full)


def _opened_by(plan: Plan, form: Form) -> str:
    if form is SIDECAR:
        return "the model itself stays as it is, for any program"
    if plan.projection == FITTED:
        return "the copy opens in pop-local only, since stock llama.cpp refuses added tensors"
    return "stock llama.cpp opens the copy, too"


def _facts(src: Path, plan: Plan, form: Form, sizes: Sizes) -> list[Fact]:
    n_layer = plan.shape.n_layer
    return [
        ("Model", str(src)),
        ("Architecture", plan.shape.arch),
        ("Layers", f"{n_layer}, of which context tokens skip {plan.n_skipped}"),
        ("Boundary", f"layer {plan.boundary}"),
        ("Schedule", plan.schedule),
        ("K/V of skipped", f"{plan.projection} projections; {_opened_by(plan, form)}"),
        ("Always in full", f"the first {plan.sink_tokens} and last {plan.tail_tokens} tokens"),
        ("Size", f"{size(sizes.source_bytes)}, {form.name} {size(sizes.output_bytes)}"),
        ("Speed-up", f"at most {_limit(plan):.2f}x for a prompt of {LIMIT_PROMPT:,} tokens"),
    ]


def _report(
    src: Path, dst: Path, plan: Plan, form: Form, sizes: Sizes, meta: PopMeta | None
) -> Report:
    return Report(
        source=str(src),
        output=str(dst),
        form=form.name,
        architecture=plan.shape.arch,
        n_layer=plan.shape.n_layer,
        boundary=plan.boundary,
        n_skipped=plan.n_skipped,
        schedule=plan.schedule,
        projection=plan.projection,
        sink_tokens=plan.sink_tokens,
        tail_tokens=plan.tail_tokens,
        min_prompt=plan.min_prompt,
        source_bytes=sizes.source_bytes,
        output_bytes=sizes.output_bytes,
        limit_n_prompt=LIMIT_PROMPT,
        speedup_limit=_limit(plan),
        source_sha256=meta.source_sha256 if meta else None,
        calibration=meta.calibration if meta else None,
        measured=meta.measured if meta else None,
    )
