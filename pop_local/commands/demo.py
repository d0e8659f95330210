"""`pop-local demo [MODEL]`: answer a question with and without pruning."""

from typing import Annotated

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.opening import Opener, warn_if_busy
from pop_local.commands.option_expansion import expand_options
from pop_local.models.model_names import DEFAULT_MODEL
from pop_local.ui.console import say
from pop_local.ui.tables import print_json
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.demo import MAX_TOKENS, Demonstration, demonstrate


@expand_options
def demo(
    model: opt.Converted = DEFAULT_MODEL,
    *,
    pairs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of answers per mode.")] = 3,
    json: opt.Json = False,
    how: opt.OpenOptions,
) -> None:
    """Answer one question about a document with and without fast reading.

    Greedy decoding makes the two short answers comparable.
    """
    warn_if_busy(how.threads)
    opened = Opener(model, opt.ModelOptions(**vars(how)))()
    with terminal_watch() as watch:
        demonstration = demonstrate(opened, pairs, watch)
    print_json(demonstration) if json else show_demonstration(demonstration)


def show_demonstration(demonstration: Demonstration) -> None:
    full, pop, speedup = demonstration.full, demonstration.pop, demonstration.speedup
    say(f"Model: {demonstration.model}")
    say(f"Prompt: a document and a question, {demonstration.n_prompt:,} tokens in total")
    say(f"Question: {demonstration.question}")
    say(f"Answers: up to {MAX_TOKENS} tokens, with greedy decoding\n")
    median = " (median)" if demonstration.n_pairs > 1 else ""
    say(f"With full reading, the first token took {full.ttft_s:.2f} s{median}:\n  {full.text}\n")
    say(f"With fast reading, the first token took {pop.ttft_s:.2f} s{median}:\n  {pop.text}\n")
    if full.text != pop.text:
        say("The answers differ. `pop-local eval` measures the quality loss.\n")
    pairs = ""
    if demonstration.n_pairs > 1:
        pairs = f" (median of {demonstration.n_pairs}, range {speedup.min:.2f}-{speedup.max:.2f})"
    predicted = f"The operation count predicts a speedup of {demonstration.limit:.2f}x."
    say(f"Speedup: {speedup.median:.2f}x{pairs}. {predicted}")
    skipped = f"{demonstration.n_layer - demonstration.boundary} of {demonstration.n_layer} layers"
    say(
        f"Fast reading skipped {skipped} for {pop.n_pruned:,} of {demonstration.n_prompt:,} tokens."
    )
