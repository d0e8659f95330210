"""`pop-local bench MODEL`: measure the time to first token with and without pruning."""

from contextlib import suppress
from dataclasses import dataclass

import typer

from pop_converter.popfile.format import DeepRows
from pop_local.commands import shared_options as opt
from pop_local.commands.opening import warn_if_busy
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.ui.console import note, warn
from pop_local.ui.tables import print_json
from pop_local.ui.views.bench import show_speed
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows import bench as workflow

# Number of tokens per kernel whose reading takes minutes.
_N_LONG = 4096


@dataclass(frozen=True)
class PromptOptions(Group):
    prompt: str = option("Prompt lengths in tokens.", "N,N,...", default="512,1024,2048")
    repeat: int = option("Number of full and fast runs for each prompt length.", min=1, default=5)
    deep_rows: DeepRows | None = option(opt.DEEP_ROWS)


@expand_options
def bench(
    model: opt.Converted,
    *,
    read: PromptOptions,
    json: opt.Json = False,
    measured: opt.MeasureOptions,
) -> None:
    """Measure the time to first token with and without fast reading, in alternating runs."""
    options = workflow.BenchOptions(
        _lengths(read.prompt),
        n_pairs=read.repeat,
        n_ctx=measured.n_ctx,
        hardware=measured.hardware,
        deep_rows=read.deep_rows,
    )
    warn_if_busy(measured.threads)
    if (read.repeat + 1) * sum(options.n_prompts) > _N_LONG:
        note(
            "With a catalog model, bench usually takes 4 to 15 minutes, depending on the model's"
            " size. For a quick result in 1 to 2 minutes, pass --prompt 512 --repeat 1."
        )
    with stoppable_watch() as watch:
        speed = workflow.bench(model, measured.sidecar, options, watch)
    print_json(speed) if json else show_speed(speed)
    if read.repeat < 2:
        warn("One pair of runs does not show how much the times vary. Set --repeat to at least 3.")


def _lengths(text: str) -> tuple[int, ...]:
    with suppress(ValueError):
        lengths = tuple(int(part) for part in text.split(","))
        if min(lengths) >= 1:
            return lengths
    raise typer.BadParameter(
        f"{text!r} is not a list of positive integers such as 512,2048", param_hint="--prompt"
    )
