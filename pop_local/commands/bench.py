"""`pop-local bench MODEL`: time to first token, pruned against full."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from converter.errors import PopError
from converter.shape import source_shape, trained_ctx
from converter.sidecar import pop_of
from converter.source import Source, read_source
from pop_local.commands.options import GpuLayers, MeasuredCtx, Pop, Threads
from pop_local.commands.ready import files_at_depth, model_files
from pop_local.models.files import ModelFiles
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import Column, Table, markdown, print_json
from pop_local.ui.theme import say

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.break_even import BreakEven, Tried
    from pop_local.measure.speed import ModePair, SpeedRow, Spread

DEFAULT_PROMPTS = "512,1024,2048"


@dataclass(frozen=True)
class Report:
    """What `--json` prints."""

    model: str
    sidecar: str | None
    backend: str
    rows: "tuple[SpeedRow, ...]"


@dataclass(frozen=True)
class BreakEvenReport:
    """What `--find-break-even --json` prints; `min_prompt`: what the file says now."""

    model: str
    sidecar: str | None
    backend: str
    boundary: int
    min_prompt: int
    break_even: int | None
    tried: "tuple[Tried, ...]"


def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A converted GGUF file, or one with a sidecar."),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="N,N,...", help="Prompt lengths in tokens.")
    ] = DEFAULT_PROMPTS,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Pairs of runs for each length.")
    ] = 5,
    boundary: Annotated[
        int | None,
        typer.Option("--boundary", min=1, help="Prune from this layer on, whatever the file says."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Tokens that are read at once.")
    ] = 512,
    find_break_even: Annotated[
        bool,
        typer.Option(
            "--find-break-even",
            help="Search for the shortest prompt that gains, up to the longest of --prompt.",
        ),
    ] = False,
    pop: Pop = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Threads = None,
    n_ctx: MeasuredCtx = None,
    gpu_layers: GpuLayers = -1,
) -> None:
    """Measure time to first token with and without pruning, in alternation on the same weights."""
    n_prompts = _lengths(prompt)
    if find_break_even and repeat < 2:
        raise typer.BadParameter("--find-break-even needs the spread of 2 pairs at least: --repeat")
    if boundary is None:
        files = model_files(model, pop, threads=threads, gpu_layers=gpu_layers)
    else:
        files = files_at_depth(model, pop)
    source = read_source(files.path)
    shape = source_shape(source)
    if boundary is None:
        _require_boundary(source, files)
    from pop_local.measure.speed import N_DECODE, measure_speed

    n_context = _context(source, max(n_prompts) + N_DECODE, n_ctx)
    opened = _opened(files, boundary, n_context, batch, threads, gpu_layers)
    if find_break_even:
        _break_even(opened, files, max(n_prompts), repeat, _backend(opened, gpu_layers), json=json)
        return
    with token_progress("Measuring") as advance:
        rows = measure_speed(opened, shape, n_prompts, repeat, advance)
    sidecar = str(files.sidecar) if files.sidecar else None
    report = Report(str(files.path), sidecar, _backend(opened, gpu_layers), rows)
    if json:
        print_json(report)
    else:
        _show(report, opened.boundary, shape.n_layer)


def _lengths(prompt: str) -> tuple[int, ...]:
    parts = [part.strip() for part in prompt.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{prompt!r} is not a list of lengths such as {DEFAULT_PROMPTS}")
    return tuple(int(part) for part in parts)


def _require_boundary(source: Source, files: ModelFiles) -> None:
    path = files.path
    if pop_of(source, files.sidecar) is None:
        raise PopError(
            f"{path} is not converted: there is nothing to compare",
            f"convert it (pop-local convert {path}), or choose a --boundary",
        )


def _context(source: Source, n_needed: int, ctx: int | None) -> int:
    """The context to open, which must hold the longest prompt and what is decoded after it."""
    trained = trained_ctx(source.first)
    if ctx is not None and ctx < n_needed:
        raise PopError(
            f"the longest prompt takes {n_needed} tokens of context, --ctx gives {ctx}",
            "leave --ctx out, or give shorter prompts (--prompt)",
        )
    if trained is not None and trained < n_needed:
        raise PopError(
            f"the longest prompt takes {n_needed} tokens of context, the model has {trained}",
            "give shorter prompts (--prompt)",
        )
    return ctx or n_needed


def _opened(
    files: ModelFiles,
    boundary: int | None,
    n_ctx: int,
    batch: int,
    threads: int | None,
    gpu_layers: int,
) -> "PopModel":
    from pop_local.engine.model import PopModel

    opened = PopModel(
        files.path,
        sidecar=files.sidecar,
        n_ctx=n_ctx,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        n_batch=batch,
        n_ubatch=batch,
    )
    if boundary is not None:
        opened.set_boundary(boundary)
    return opened


def _backend(opened: "PopModel", gpu_layers: int) -> str:
    """The device that does the work, and the threads."""
    from pop_local.engine.llama.backend import devices

    found = devices()
    gpus = [device for device in found if device.is_gpu]
    device = gpus[0] if gpus and gpu_layers != 0 else found[-1]
    threads = "1 thread" if opened.n_threads == 1 else f"{opened.n_threads} threads"
    return f"{device.name} ({device.description}), {threads}"


def _show(report: Report, boundary: int, n_layer: int) -> None:
    skipped = f"context tokens skip layers {boundary} to {n_layer - 1} of {n_layer}"
    lines = [
        f"{report.model}: {skipped}",
        f"{report.backend}; medians, in brackets the extremes",
        "",
        markdown(_table(report.rows)),
    ]
    say("\n".join(lines))


def _break_even(
    opened: "PopModel", files: ModelFiles, n_longest: int, n_pairs: int, device: str, *, json: bool
) -> None:
    from pop_local.measure.break_even import measure_break_even

    n_tried = 0
    with token_progress("Searching") as advance:

        def tried(one: "Tried") -> None:
            nonlocal n_tried
            n_tried += 1
            # Doubling up to the longest takes most of the steps.
            advance(n_tried, max(n_tried, n_longest.bit_length()))

        found = measure_break_even(opened, n_pairs, n_longest, tried)
    report = BreakEvenReport(
        model=str(files.path),
        sidecar=str(files.sidecar) if files.sidecar else None,
        backend=device,
        boundary=opened.boundary,
        min_prompt=opened.rule.min_prompt,
        break_even=found.n_prompt,
        tried=found.tried,
    )
    if json:
        print_json(report)
        return
    lines = [
        f"{report.model}: pruned from layer {report.boundary} on; {device}",
        "Gains: the median lies above 1 by more than the quartiles of the pairs lie apart.",
        "",
        markdown(_tried_table(found)),
        "",
        _advice(report, n_longest),
    ]
    say("\n".join(lines))


def _advice(report: BreakEvenReport, n_longest: int) -> str:
    now = "the file names no shortest prompt"
    if report.min_prompt:
        now = f"the file prunes from {report.min_prompt:,} tokens on"
    if report.break_even is None:
        return f"Pruning gains nothing here up to {n_longest:,} tokens; {now}."
    return (
        f"Pruning gains from {report.break_even:,} tokens on; {now}"
        f" (pop-local convert --min-prompt {report.break_even})."
    )


def _tried_table(found: "BreakEven") -> Table:
    columns = (
        Column("n_prompt", "Prompt tokens", "{:,}".format, numeric=True),
        Column("n_pruned", "pruned", "{:,}".format, numeric=True),
        Column("speedup", "Speed-up", _precise, numeric=True),
        Column("iqr", "Quartiles apart", "{:.3f}".format, numeric=True),
        Column("wins", "Gains", lambda wins: "yes" if wins else "no"),
    )
    rows = (tuple(getattr(one, column.key) for column in columns) for one in found.tried)
    return Table(columns, tuple(rows))


def _precise(spread: "Spread") -> str:
    return f"{spread.median:.3f} ({spread.min:.3f}-{spread.max:.3f})"


def _table(rows: "tuple[SpeedRow, ...]") -> Table:
    columns = (
        Column("n_prompt", "Prompt tokens", "{:,}".format, numeric=True),
        Column("n_pruned", "pruned", "{:,}".format, numeric=True),
        Column("full_ttft_s", "TTFT full (s)", _seconds, numeric=True),
        Column("pop_ttft_s", "TTFT pruned (s)", _seconds, numeric=True),
        Column("speedup", "Speed-up", _ratio, numeric=True),
        Column("limit", "Limit", "{:.2f}".format, numeric=True),
        Column("of_limit", "of limit", "{:.0%}".format, numeric=True),
        Column("decode_tokens_per_s", "Decode full / pruned (tokens/s)", _rates, numeric=True),
    )
    values = [[getattr(row, column.key) for column in columns] for row in rows]
    return Table(columns, tuple(tuple(row) for row in values))


def _seconds(spread: "Spread") -> str:
    return f"{spread.median:.3f} ({spread.min:.3f}-{spread.max:.3f})"


def _ratio(spread: "Spread") -> str:
    return f"{spread.median:.2f}x ({spread.min:.2f}-{spread.max:.2f})"


def _rates(pair: "ModePair") -> str:
    return f"{pair.full:.1f} / {pair.pop:.1f}"
