"""Windows of synthetic look-ups: a document with exact values, then questions and answers.

Running text rarely needs an exact string of its context, so a fit on running text alone loses
look-ups first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import PopError
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.texts.carrier_values import Use
from pop_local.texts.carriers import AnsweredCarrier, CarrierSettings, make_carrier, with_answers

# One of SHARE windows is a look-up document.
SHARE = 4
# The share of a window that its document takes; questions and answers take the rest.
_DOCUMENT = 0.55
_MOST = 64


@dataclass(frozen=True)
class CarrierWindows:
    """`windows` int32 [n, n_tokens]; `answers` bool [n, n_tokens] marks the answers' tokens."""

    windows: NDArray[np.int32]
    answers: NDArray[np.bool_]


def carrier_windows(
    context: Context, n: int, n_tokens: int, prose: str, seed: int
) -> CarrierWindows:
    """Build `n` windows of `n_tokens` tokens, determined by the seed.

    The result is empty if the vocabulary is too small to fit a document into a window.
    """
    rng = np.random.default_rng(seed)
    windows = np.zeros((n, n_tokens), np.int32)
    answers = np.zeros((n, n_tokens), bool)
    prefix = list(context.vocabulary.bos)
    filler = context.vocabulary.tokenize(prose[: 8 * n_tokens])
    for i, (window, marked) in enumerate(zip(windows, answers, strict=True)):
        try:
            carrier = _written(context, rng, n_tokens - len(prefix), prose)
        except PopError:
            return CarrierWindows(windows[:i], answers[:i])
        tokens = context.vocabulary.tokenize(carrier.text)
        is_answer = _marked(context, tokens, carrier)
        # A tiny vocabulary's first block may be too long. The questions at the end must stay.
        tokens, is_answer = tokens[-n_tokens + len(prefix) :], is_answer[-n_tokens + len(prefix) :]
        row = [*prefix, *tokens]
        window[:] = np.resize([*row, *filler], n_tokens)
        marked[len(prefix) : len(row)] = is_answer
    return CarrierWindows(windows, answers)


def _written(
    context: Context, rng: np.random.Generator, n_tokens: int, prose: str
) -> AnsweredCarrier:
    """Build a document with as many questions as fit into `n_tokens`, but one or more."""

    def count(text: str) -> int:
        return len(context.vocabulary.tokenize(text))

    settings = CarrierSettings(int(_DOCUMENT * n_tokens), _MOST, Use.FITTING)
    carrier = make_carrier(rng, settings, prose, count)
    for n in range(len(carrier.questions), 1, -1):
        answered = with_answers(replace(carrier, questions=carrier.questions[:n]))
        if count(answered.text) <= n_tokens:
            return answered
    return with_answers(replace(carrier, questions=carrier.questions[:1]))


def _marked(context: Context, tokens: Sequence[int], carrier: AnsweredCarrier) -> list[bool]:
    """Return True for each token that spells a part of an answer."""
    pieces = Pieces(context.vocabulary)
    ends = np.cumsum([len(pieces[token]) for token in tokens])
    # Some tokenizers put a space before the text.
    shift = int(ends[-1]) - len(carrier.text.encode())
    starts = np.append(0, ends[:-1])
    marked = np.zeros(len(tokens), bool)
    for first, last in carrier.answers:
        start = len(carrier.text[:first].encode()) + shift
        end = len(carrier.text[:last].encode()) + shift
        marked |= (ends > start) & (starts < end)
    return [bool(each) for each in marked]
