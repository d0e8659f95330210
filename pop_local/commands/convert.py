"""`pop-local convert IN.gguf [OUT.gguf]`: write the model with its pruning schedule."""

from pathlib import Path
from typing import Annotated, Any

import typer

from converter.format import FITTED, PopMeta
from converter.plan import DEFAULT_SKIP, TAIL_TOKENS, Plan, Share, make_plan
from converter.shape import source_shape
from converter.source import read_source
from pop_local.commands.budgeting import (
    MaxCopyRatio,
    MaxKl,
    QualityOption,
    convert_within,
    given_budget,
    possible_boundaries,
)
from pop_local.commands.converting import Job, fit_and_write
from pop_local.commands.describing import facts, show_written
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
from pop_local.commands.forms import COPY, SIDECAR
from pop_local.commands.options import GpuLayers, Threads, share
from pop_local.models.names import resolve_base
from pop_local.ui.tables import print_facts

STATE_SUFFIX = ".calibration"


def convert(
    model: Annotated[str, typer.Argument(metavar="IN.gguf", help="A model, or its first part.")],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.gguf", help="Default: IN.pop.gguf beside it."),
    ] = None,
    skip: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Layers to skip: 1/3, 0.33, or a number. Default: as many as --quality allows.",
        ),
    ] = None,
    boundary: Annotated[
        int | None,
        typer.Option(metavar="LAYER", help="The first layer to skip, instead of --skip."),
    ] = None,
    quality: QualityOption = None,
    max_kl: MaxKl = None,
    max_copy_ratio: MaxCopyRatio = None,
    sink: Annotated[
        int, typer.Option(min=0, help="First tokens of a prompt to run in full.")
    ] = PopMeta.sink_tokens,
    tail: Annotated[
        int, typer.Option(min=0, help="Last tokens of a prompt to run in full.")
    ] = TAIL_TOKENS,
    min_prompt: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Shorter prompts run in full. Default: those that save less than half of what"
            " long ones save, about 70.",
        ),
    ] = None,
    projection: Annotated[
        ProjectionName,
        typer.Option(
            help="K/V of skipped layers: fitted to the model (takes minutes), or their own (no"
            " fit, loses more quality)."
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
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace an existing output. With --skip or --boundary: write a fit, too, that can"
            " no longer copy from its prompt.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a copy of a model that reads long prompts faster.

    As many layers are skipped as the quality asked for allows: near-lossless is a KL divergence of
    at most 0.01 from the full model and a repeated passage at most 1.02 times as perplexing,
    balanced 0.035 and 1.12, fast 0.1 and 1.3, all on held-out text. --skip and --boundary say it
    themselves.

    The weights stay as they are. The K/V projections of the skipped layers are fitted to the model
    and added, so that only pop-local opens the copy; what that leaves of the model's quality is
    measured, printed and stored. With --projection own nothing is added, and stock llama.cpp opens
    the copy too (and runs it in full). With --sidecar the model itself stays the file to open, here
    and elsewhere.
    """
    skipped = _skipped(skip, boundary)
    has_depth = (skip, boundary) != (None, None)
    budget = given_budget(quality, max_kl, max_copy_ratio, has_depth=has_depth)
    path = resolve_base(model)
    source = read_source(path)
    shape = source_shape(source)
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
    options.require_text(shape.n_embd)

    def planned(**depth: Any) -> Plan:
        return make_plan(
            shape,
            **depth,
            sink_tokens=sink,
            tail_tokens=tail,
            min_prompt=min_prompt,
            projection=projection.value,
        )

    job = Job(source, target, form, options, threads, gpu_layers, force)
    if budget is not None:
        plans = tuple(planned(boundary=each) for each in possible_boundaries(shape))
        convert_within(budget, plans, job, dry_run=dry_run, json=json)
        return
    plan = planned(skip=skipped, boundary=boundary)
    sizes = job.measure(plan)
    if not json:
        fit = fit_facts((plan,), source, options) if plan.projection == FITTED else []
        print_facts([*facts(plan, job, sizes), *fit])
    meta = None
    if not dry_run:
        job.check_target(sizes)
        meta = fit_and_write(plan, job, allow_broken_copy=force)
    show_written(plan, job, sizes, meta, (), json=json)


def _skipped(skip: str | None, boundary: int | None) -> Share:
    if skip is None:
        return DEFAULT_SKIP
    if boundary is not None:
        raise typer.BadParameter("give one of --skip and --boundary", param_hint="--boundary")
    return share(skip, "--skip")
