"""`pop-local demo [MODEL]`: one question about a long document, with and without pruning."""

import importlib.resources
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from pop_converter.errors import PopError
from pop_converter.shape import read_shape

from pop_local.commands.options import (
    DEFAULT_THEME,
    Ctx,
    GpuLayers,
    MaxTokens,
    Pop,
    Seed,
    Temperature,
    Theme,
    Threads,
    TopP,
    sampling,
)
from pop_local.commands.ready import model_files, open_ready
from pop_local.commands.talking import conversation, talk
from pop_local.models import DEFAULT_MODEL
from pop_local.ui.progress import token_progress
from pop_local.ui.screen import TerminalScreen
from pop_local.ui.tables import print_json
from pop_local.ui.theme import look, note, say

if TYPE_CHECKING:
    from pop_local.engine.backend import Mode
    from pop_local.engine.model import PopModel

# Of the two answers.
MAX_TOKENS = 32
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """One of the two answers."""

    text: str
    ttft_s: float
    n_pruned: int
    n_full: int


@dataclass(frozen=True)
class Report:
    """What `--json` prints; `limit` is what the multiply-accumulates allow at most."""

    model: str
    boundary: int
    n_layer: int
    question: str
    n_prompt: int
    full: Answer
    pop: Answer
    speedup: float
    limit: float


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A converted GGUF file or a catalog name. Default: {DEFAULT_MODEL}",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and open no chat.")
    ] = False,
    system: Annotated[str, typer.Option("--system", help="System prompt of the chat.")] = "",
    pop: Pop = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Ctx = None,
    gpu_layers: GpuLayers = -1,
    theme: Theme = DEFAULT_THEME,
) -> None:
    """Answer one question about a document twice, then open the chat.

    The two answers are short and take the likeliest tokens, to be compared; how answers are
    sampled is said for the chat.
    """
    screen = TerminalScreen(look(theme))
    chosen = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    files = model_files(model, pop, threads=threads, gpu_layers=gpu_layers)
    path = files.path
    shape = read_shape(path)
    from pop_local.engine.model import open_model

    opened = open_model(
        path, sidecar=files.sidecar, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers
    )
    from pop_local.engine.backend import Mode
    from pop_local.measure.limit import speedup_limit

    if opened.meta is None:
        raise PopError(f"{path} is not converted", f"convert it first: pop-local convert {path}")
    _warm_up(opened)
    full = _answer(opened, Mode.OFF)
    pruned = _answer(opened, Mode.CONTEXT)
    n_prompt = full.n_full
    report = Report(
        model=str(path),
        boundary=opened.boundary,
        n_layer=shape.n_layer,
        question=_text("question.md"),
        n_prompt=n_prompt,
        full=full,
        pop=pruned,
        speedup=full.ttft_s / pruned.ttft_s,
        limit=speedup_limit(shape, n_prompt, opened.boundary, pruned.n_full),
    )
    if json:
        print_json(report)
        return
    say("\n".join(_lines(report)))
    if sys.stdin.isatty():

        def open_again(name: str | None, n_ctx: int | None) -> "PopModel":
            return open_ready(
                name or str(path),
                threads=threads,
                ctx=n_ctx or ctx,
                gpu_layers=gpu_layers,
                no_pop=False,
                pop=None if name else files.sidecar,
            )

        note("Now it is your turn; pruning is on. /help lists the commands, /exit leaves.")
        talk(conversation(opened, open_again, screen, system=system, sampling=chosen))


def _text(name: str) -> str:
    folder = importlib.resources.files("pop_local") / "data"
    return (folder / name).read_text(encoding="utf-8").strip()


def _warm_up(opened: "PopModel") -> None:
    """The first run of all reads the weights from the disk, and would be the slower one."""
    opened.eval(opened.tokenize(_text("document.md").encode())[:WARM_UP_TOKENS])


def _answer(opened: "PopModel", mode: "Mode") -> Answer:
    """Into an empty cache; raises PopError unless the counters prove that it was."""
    from pop_local.engine.backend import Counters
    from pop_local.engine.turn import Message
    from pop_local.measure.speed import require_rows

    opened.set_pop(mode)
    opened.clear()
    prompt = f"{_text('document.md')}\n\n{_text('question.md')}"
    what = "Reading in full" if mode.name == "OFF" else "Reading, pruned"
    with token_progress(what) as advance:
        chunks = list(
            opened.chat_turn(
                [Message("user", prompt)],
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                on_prefill=advance,
            )
        )
    stats = chunks[-1].stats
    assert stats is not None, "the last chunk carries the figures"
    require_rows(opened, mode, stats.n_prompt, Counters(stats.n_pruned, stats.n_full))
    text = "".join(chunk.text for chunk in chunks).strip()
    return Answer(text, stats.ttft_s, stats.n_pruned, stats.n_full)


def _lines(report: Report) -> Iterator[str]:
    yield f"Model: {report.model}"
    yield f"Prompt: a document of ours and a question, {report.n_prompt:,} tokens"
    yield f"Question: {report.question}"
    yield ""
    yield f"Pruning off, first token after {report.full.ttft_s:.2f} s:"
    yield f"  {report.full.text}"
    yield ""
    yield f"Pruning on, first token after {report.pop.ttft_s:.2f} s:"
    yield f"  {report.pop.text}"
    yield ""
    yield f"Speed-up: {report.speedup:.2f}x (analytical limit {report.limit:.2f}x)"
    yield (
        f"Tokens pruned: {report.pop.n_pruned:,} of {report.n_prompt:,}; they skipped"
        f" {report.n_layer - report.boundary} of {report.n_layer} layers"
    )
