"""`pop-local bench MODEL`: time to first token, pruned against full."""

from pathlib import Path
from typing import Annotated

import typer

from pop_local.commands import options as opt
from pop_local.commands.unfolding import unfolded
from pop_local.ui.tables import print_json
from pop_local.ui.theme import warn
from pop_local.ui.views import speed as view
from pop_local.ui.watch import stoppable_watch

DEFAULT_PROMPTS = "512,1024,2048"


@unfolded
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
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="A picture that is part of each prompt."),
    ] = None,
    mmproj: opt.Mmproj = None,
    image_tokens: opt.ImageTokens = None,
    select: opt.Select = None,
    json: opt.Json = False,
    measured: opt.MeasureOptions = opt.MeasureOptions(),
) -> None:
    """Measure time to first token with and without pruning, in alternation on the same weights."""
    n_prompts = opt.lengths(prompt, "--prompt", least=1)
    if find_break_even and repeat < 2:
        raise typer.BadParameter("--find-break-even needs the spread of 2 pairs at least: --repeat")
    if find_break_even and image is not None:
        raise typer.BadParameter("--find-break-even is of text: leave out --image")
    if image is None and (mmproj is not None or image_tokens is not None):
        raise typer.BadParameter("--mmproj and --image-tokens are for an --image: give one")
    from pop_local.workflows import bench as workflow

    options = workflow.BenchOptions(
        n_prompts,
        repeat,
        boundary,
        batch,
        measured.n_ctx,
        measured.hardware,
        opt.selected(select),
        image,
        mmproj,
        image_tokens,
    )
    if find_break_even:
        with stoppable_watch() as watch:
            gained = workflow.find_break_even(model, measured.sidecar, options, watch)
        print_json(view.gain_json(gained)) if json else view.show_gain(gained, max(n_prompts))
    else:
        with stoppable_watch() as watch:
            speed = workflow.bench(model, measured.sidecar, options, watch)
        print_json(view.speed_json(speed)) if json else view.show_speed(speed)
        if repeat < 2:
            warn("One pair of runs says nothing of noise: give --repeat 3, say.")
