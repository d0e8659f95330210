"""`pop-local run MODEL "question"`: one answer, also about files and piped text."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pop_converter.errors import PopError

from pop_local.commands.options import (
    Ctx,
    GpuLayers,
    MaxTokens,
    NoPop,
    Pop,
    Seed,
    Temperature,
    Threads,
    TopP,
    sampling,
)
from pop_local.commands.ready import open_ready
from pop_local.engine.turn import Chunk, Message, TurnStats
from pop_local.ui.interrupt import deferred_interrupt
from pop_local.ui.screen import TerminalScreen, showing_prefill
from pop_local.ui.stats import stats_line
from pop_local.ui.tables import print_json

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel


@dataclass(frozen=True)
class Answer:
    """What `--json` prints."""

    model: str
    text: str
    pop: bool
    boundary: int
    stats: TurnStats
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF file, or a name of the catalog.")
    ],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="Not needed when text is piped in.")
    ] = "",
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A text to ask about; can be given several times."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    pop: Pop = None,
    no_pop: NoPop = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Ctx = None,
    gpu_layers: GpuLayers = -1,
) -> None:
    """Answer one question. Files and piped text come before it in the prompt.

    A model without a chat template continues the text instead.
    """
    prompt = _prompt(question, file or [])
    options = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opened = open_ready(
        model, threads=threads, ctx=ctx, gpu_layers=gpu_layers, no_pop=no_pop, pop=pop
    )
    screen = TerminalScreen()
    with deferred_interrupt() as interrupt:
        options["should_stop"] = lambda: interrupt.asked
        chunks = showing_prefill(
            screen,
            lambda advance: _chunks(opened, system, prompt, options | {"on_prefill": advance}),
        )
        if json:
            print_json(_collected(opened, chunks))
        else:
            _show(screen, chunks)
    if interrupt.asked:
        raise KeyboardInterrupt


def _prompt(question: str, files: list[Path]) -> str:
    """The question comes last, so that it lies in the tail that runs all layers."""
    texts = [_decoded(path.read_bytes(), str(path)) for path in files]
    if not sys.stdin.isatty():
        texts.append(_decoded(sys.stdin.buffer.read(), "the piped text"))
    texts.append(question)
    prompt = "\n\n".join(text.strip("\n") for text in texts if text.strip())
    if not prompt:
        raise typer.BadParameter("give a question, a --file, or pipe some text in")
    return prompt


def _decoded(content: bytes, origin: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PopError(f"{origin} is not UTF-8 text", "convert it to plain text first") from error


def _chunks(
    opened: "PopModel", system: str, prompt: str, options: dict[str, Any]
) -> Iterator[Chunk]:
    if "tokenizer.chat_template" not in opened.metadata:
        from pop_local.engine.plain import continue_text

        return continue_text(opened, prompt, **options)
    preamble = [Message("system", system)] if system else []
    return opened.chat_turn([*preamble, Message("user", prompt)], **options)


def _show(screen: TerminalScreen, chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        screen.text(chunk.text)
        if chunk.stats is not None:
            screen.end_answer()
            screen.note(stats_line(chunk.stats))


def _collected(opened: "PopModel", chunks: Iterator[Chunk]) -> Answer:
    pieces = list(chunks)
    stats = pieces[-1].stats
    assert stats is not None, "the last chunk carries the figures"
    return Answer(
        model=opened.model_path,
        text="".join(chunk.text for chunk in pieces),
        pop=bool(opened.pop_mode),
        boundary=opened.boundary,
        stats=stats,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        decode_tokens_per_s=stats.decode_tokens_per_s,
    )
