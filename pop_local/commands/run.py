"""`pop-local run [MODEL] "question"`: print one answer."""

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from pop_local.commands import shared_options as opt
from pop_local.commands.opening import (
    Opener,
    default_model,
    open_prompt_cache,
    store_prompts,
)
from pop_local.commands.option_expansion import expand_options
from pop_local.engine.answer import ContextFullError
from pop_local.engine.chat_messages import Chunk
from pop_local.engine.images.pictures import read_picture
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.texts.document_readers import Document, decoded, read_document, read_limited
from pop_local.ui.chat.dialogue import warn_of_base_model
from pop_local.ui.chat.overflow import answer_reserve, too_long
from pop_local.ui.chat.screen import Screen
from pop_local.ui.ctrl_c import deferred_interrupt
from pop_local.ui.tables import print_json
from pop_local.ui.views.stats import counted_line, picture_line, stats_line


@expand_options
def run(
    model: opt.OptionalModel = None,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="The question (optional if you pipe in text).")
    ] = "",
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="Text, PDF, or DOCX file to include (repeatable)."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Image to include (repeatable).")
    ] = None,
    json: opt.Json = False,
    system: opt.System = "",
    how: opt.ModelOptions,
    sampling: opt.SamplingOptions,
) -> None:
    """Answer one question. The prompt contains images, files, and piped text before the question.

    A model without a chat template continues the text instead of answering.
    """
    if not question and _is_question(model or ""):
        model, question = None, model or ""
    documents, pictures = tuple(_documents(file or [])), tuple(map(read_picture, image or []))
    turn = Turn(question, documents, pictures=pictures)
    if not turn.prompt and not pictures:
        raise typer.BadParameter("pass a question, a --file, or piped text")
    messages = Conversation(system, (turn,)).messages
    screen = Screen()
    how = replace(how, refill="off")  # the command exits after one answer
    opened = Opener(model or default_model(), how, prompt_cache=open_prompt_cache(how))()
    warn_of_base_model(screen, opened)
    engine = opened.engine
    n_ctx = engine.context.n_ctx
    for picture in pictures:
        screen.note(picture_line(picture, engine.prompter.count_picture(picture), n_ctx))
    for document in documents:
        n_tokens = len(engine.context.vocabulary.tokenize(document.text))
        screen.note(counted_line(document.name, n_tokens, n_ctx))
    options = sampling.given
    options["ends_repeats"] = True
    options["min_answer"] = answer_reserve(sampling.max_tokens, n_ctx)
    with deferred_interrupt() as interrupt:
        options["should_stop"] = lambda: interrupt.asked
        try:
            with screen.reading() as advance:
                answer = opened.ask(messages, **options, on_prefill=advance)
                chunks = chain([next(answer)], answer)
            if json:
                print_json(_collected(opened, chunks))
            else:
                _show(screen, chunks)
        except ContextFullError as error:
            raise too_long(opened.engine, error) from error
        store_prompts(opened)
    if interrupt.asked:
        raise KeyboardInterrupt


def _is_question(text: str) -> bool:
    """Return True if the only argument is a question, not a model."""
    # Path.exists raises OSError for long text.
    return len(text.split()) > 1 and not os.path.exists(text)  # noqa: PTH110


def _documents(files: list[Path]) -> Iterator[Document]:
    for path in files:
        yield read_document(path)
    if not sys.stdin.isatty():
        piped = decoded(_piped(), "the piped text")
        if piped.strip():
            yield Document("the piped text", piped)


def _piped() -> bytes:
    try:
        return read_limited(sys.stdin.buffer, "the piped text")
    except OSError as error:
        if error.errno != errno.EBADF:  # nohup closes stdin
            raise
        return b""


def _show(screen: Screen, chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        if chunk.text:
            screen.text(chunk.text)
        if chunk.stats is not None:
            screen.end_answer()
            screen.note(stats_line(chunk.stats))


def _collected(opened: PopModel, chunks: Iterator[Chunk]) -> dict[str, Any]:
    pieces = list(chunks)
    stats = pieces[-1].stats
    assert stats is not None
    return {
        "model": opened.engine.context.files.path,
        "text": "".join(chunk.text for chunk in pieces),
        "full": not opened.engine.sequences[0].settings.mode,
        "boundary": opened.engine.sequences[0].settings.boundary,
        "reading": stats.reading,
        "stats": stats,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
    }
