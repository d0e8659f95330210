"""`pop-local demo [MODEL]`: one question about a long document, with and without pruning."""

import importlib.resources
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from converter.errors import PopError
from converter.shape import ModelShape, read_shape
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
from pop_local.models.names import DEFAULT_MODEL
from pop_local.ui.chat.screen import TerminalScreen
from pop_local.ui.chat.start import conversation, talk
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import print_json
from pop_local.ui.theme import look, note, say

if TYPE_CHECKING:
    from pop_local.engine.llama.backend import Mode
    from pop_local.engine.model import PopModel
    from pop_local.measure.speed import Spread

# Of the two answers.
MAX_TOKENS = 32
WARM_UP_TOKENS = 64
N_PAIRS = 3


@dataclass(frozen=True)
class Answer:
    """One of the two answers; `ttft_s` is the median of all pairs."""

    text: str
    ttft_s: float
    n_pruned: int
    n_full: int


@dataclass(frozen=True)
class Report:
    """What `--json` prints; `limit` is what the multiply-accumulates allow at most.

    `speedup` is of the pairs, each an answer in full and one with pruning.
    """

    model: str
    boundary: int
    n_layer: int
    question: str
    n_prompt: int
    full: Answer
    pop: Answer
    n_pairs: int
    speedup: "Spread"
    limit: float


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A converted GGUF file or a catalog name. Default: {DEFAULT_MODEL}",
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="How many times to answer in full and pruned.")
    ] = N_PAIRS,
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
    """Answer one question about a document with and without pruning, then open the chat.

    The answers are short and take the likeliest tokens, to be compared; how answers are sampled is
    said for the chat.
    """
    screen = TerminalScreen(look(theme))
    chosen = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    files = model_files(model, pop, threads=threads, gpu_layers=gpu_layers)
    path = files.path
    shape = read_shape(path)
    from pop_local.engine.model import PopModel

    opened = PopModel(
        path, sidecar=files.sidecar, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers
    )
    if opened.meta is None:
        raise PopError(f"{path} is not converted", f"convert it first: pop-local convert {path}")
    report = _report(opened, path, shape, _answered(opened, pairs))
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
        note(f"The document is not part of this chat: /file {_data('document.md')} reads it.")
        talk(conversation(opened, open_again, screen, system=system, sampling=chosen))


def _data(name: str) -> Path:
    return Path(str(importlib.resources.files("pop_local") / "data" / name))


def _text(name: str) -> str:
    return _data(name).read_text(encoding="utf-8").strip()


def _answered(opened: "PopModel", n_pairs: int) -> list[tuple[Answer, Answer]]:
    """Pairs of an answer in full and a pruned one; which comes first changes from pair to pair."""
    from pop_local.engine.llama.backend import Mode

    # The first run of all reads the weights from the disk, and would be the slower one.
    opened.eval(opened.tokenize(_text("document.md").encode())[:WARM_UP_TOKENS])
    pairs = []
    for pair in range(n_pairs):
        order = [Mode.CONTEXT, Mode.OFF] if pair % 2 else [Mode.OFF, Mode.CONTEXT]
        nth = f"{pair + 1} of {n_pairs}"
        answers = {mode: _answer(opened, mode, nth) for mode in order}
        pairs.append((answers[Mode.OFF], answers[Mode.CONTEXT]))
    opened.set_pop(Mode.CONTEXT)
    return pairs


def _report(
    opened: "PopModel", path: Path, shape: ModelShape, pairs: list[tuple[Answer, Answer]]
) -> Report:
    from converter.macs import speedup_limit
    from pop_local.measure.speed import spread

    full, pop = pairs[0]
    return Report(
        model=str(path),
        boundary=opened.boundary,
        n_layer=shape.n_layer,
        question=_text("question.md"),
        n_prompt=full.n_full,
        full=replace(full, ttft_s=median(each.ttft_s for each, _ in pairs)),
        pop=replace(pop, ttft_s=median(each.ttft_s for _, each in pairs)),
        n_pairs=len(pairs),
        speedup=spread(full.ttft_s / pop.ttft_s for full, pop in pairs),
        limit=speedup_limit(shape, full.n_full, opened.boundary, pop.n_full),
    )


def _answer(opened: "PopModel", mode: "Mode", nth: str) -> Answer:
    """Into an empty cache; raises PopError unless the counters prove that it was."""
    from pop_local.engine.llama.backend import Counters
    from pop_local.engine.turn import Message
    from pop_local.measure.speed import require_rows

    opened.set_pop(mode)
    opened.clear()
    prompt = f"{_text('document.md')}\n\n{_text('question.md')}"
    what = "Reading in full" if mode.name == "OFF" else "Reading, pruned"
    with token_progress(f"{what}, {nth}") as advance:
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
    yield f"Answers: the likeliest tokens, {MAX_TOKENS} at most"
    yield ""
    yield f"Pruning off, first token after {report.full.ttft_s:.2f} s:"
    yield f"  {report.full.text}"
    yield ""
    yield f"Pruning on, first token after {report.pop.ttft_s:.2f} s:"
    yield f"  {report.pop.text}"
    yield ""
    found = report.speedup
    pairs = f", {found.min:.2f}-{found.max:.2f} in {report.n_pairs} pairs" * (report.n_pairs > 1)
    if report.full.text != report.pop.text:
        yield "The answers differ: pruning costs some quality, which `pop-local eval` measures."
        yield ""
    yield f"Speed-up: {found.median:.2f}x{pairs} (analytical limit {report.limit:.2f}x)"
    yield (
        f"Tokens pruned: {report.pop.n_pruned:,} of {report.n_prompt:,}; they skipped"
        f" {report.n_layer - report.boundary} of {report.n_layer} layers"
    )
