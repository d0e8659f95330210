"""Windows of synthetic look-ups: documents with exact values, followed by questions and answers.

Ordinary text rarely repeats exact strings. If a fit is computed from ordinary text alone, the
model makes errors in look-ups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.texts.carrier_values import Use
from pop_local.texts.carriers import Span, make_carrier, with_answers

# One in every SHARE windows contains look-ups.
SHARE = 4
# The document's share of a window. Questions and answers fill the rest.
_DOCUMENT = 0.55
_MOST = 64


@dataclass(frozen=True)
class CarrierWindows:
    """Look-up windows [n, n_tokens], and a mask of the same shape that marks answer tokens."""

    windows: NDArray[np.int32]
    answers: NDArray[np.bool_]


def carrier_windows(
    context: Context, n: int, n_tokens: int, prose: str, seed: int
) -> CarrierWindows:
    """Build `n` windows of `n_tokens` tokens. The same seed yields the same windows.

    Returns fewer windows if `n_tokens` is too small for a document with a question.
    """
    rng = np.random.default_rng(seed)
    windows = np.zeros((n, n_tokens), np.int32)
    answers = np.zeros((n, n_tokens), bool)
    prefix = list(context.vocabulary.bos)
    filler = context.vocabulary.tokenize(prose[: 8 * n_tokens])
    for i, (window, marked) in enumerate(zip(windows, answers, strict=True)):
        try:
            text, answer_spans = _write_document(context, rng, n_tokens - len(prefix), prose)
        except PopError:
            return CarrierWindows(windows[:i], answers[:i])
        tokens = context.vocabulary.tokenize(text)
        is_answer = _mark_answers(context, tokens, text, answer_spans)
        # With a tiny vocabulary, the text may be too long. Its start is cut, since the questions
        # at its end must be kept.
        tokens, is_answer = tokens[-n_tokens + len(prefix) :], is_answer[-n_tokens + len(prefix) :]
        row = [*prefix, *tokens]
        window[:] = np.resize([*row, *filler], n_tokens)
        marked[len(prefix) : len(row)] = is_answer
    return CarrierWindows(windows, answers)


def _write_document(
    context: Context, rng: np.random.Generator, n_tokens: int, prose: str
) -> tuple[str, list[Span]]:
    """Build a document with at least one question and as many more as fit in `n_tokens`."""

    def count(text: str) -> int:
        return len(context.vocabulary.tokenize(text))

    n_document = int(_DOCUMENT * n_tokens)
    carrier = make_carrier(
        rng, prose, count, use=Use.FITTING, n_tokens=n_document, n_questions=_MOST
    )
    for n in range(len(carrier.questions), 1, -1):
        text, spans = with_answers(replace(carrier, questions=carrier.questions[:n]))
        if count(text) <= n_tokens:
            return text, spans
    return with_answers(replace(carrier, questions=carrier.questions[:1]))


def _mark_answers(
    context: Context, tokens: Sequence[int], text: str, answers: Sequence[Span]
) -> list[bool]:
    """Return a mask of the tokens that overlap an answer."""
    pieces = Pieces(context.vocabulary)
    ends = np.cumsum([len(pieces[token]) for token in tokens])
    # Some tokenizers insert a space at the start of a text.
    shift = int(ends[-1]) - len(text.encode())
    starts = np.append(0, ends[:-1])
    marked = np.zeros(len(tokens), bool)
    for first, last in answers:
        start = len(text[:first].encode()) + shift
        end = len(text[:last].encode()) + shift
        marked |= (ends > start) & (starts < end)
    return [bool(flag) for flag in marked]
