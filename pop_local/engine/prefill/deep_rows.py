"""Find a prompt's deep rows, which are the rows of tokens in names, numbers, and identifiers.

Deep rows run through all layers. They depend only on the prompt's tokens, not on the batch size or
the number of sequences. Later questions can therefore reuse the cached rows.
"""

import re

import numpy as np
from numpy.typing import NDArray

from pop_converter.popfile.format import DeepRows
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.vocabulary import Pieces

# Brackets, quotes, and commas end a word. Otherwise a single number would make a
# whole line of CSV deep.
_WORD = re.compile(rb"[^\s,;\"'`(){}\[\]<>|*]+")
# A space, quotes, and brackets between two words take up to 4 bytes.
_LOOK_BACK = 4
_SPELLED = re.compile(rb"\d|[a-z][A-Z]|/|\w[@_\\#=+~-]+\w")


def find_deep_rows(context: Context, tokens: np.ndarray, criterion: DeepRows) -> NDArray[np.bool_]:
    """Return a mask of the deep rows, bool [n_tokens].

    `tokens`: int [n_tokens], the prompt's first tokens (negative for image rows). If a word meets
    the `criterion`, all its rows are deep. A control token or an image ends a word. Recurrent
    models have no deep rows, because scattered deep rows would split the batches.
    """
    is_deep = np.zeros(len(tokens), bool)
    if criterion is DeepRows.NONE or not len(tokens) or context.is_recurrent:
        return is_deep
    pieces = _spelled(context, tokens)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = np.append(0, ends[:-1])
    text = b"".join(pieces)
    for word in _WORD.finditer(text):
        is_name = criterion is DeepRows.NAMES and _is_name(text, word)
        if is_name or _SPELLED.search(word[0]):
            first = np.searchsorted(ends, word.start(), side="right")
            end = word.start() + len(word[0].rstrip(b".:!?"))
            is_deep[first : np.searchsorted(starts, end)] = True
    return is_deep


def _is_name(text: bytes, word: re.Match[bytes]) -> bool:
    """Return whether a word is capitalized but does not start a sentence or line."""
    if not (word[0][:1].isupper() and len(word[0]) > 1):
        return False
    before = text[max(0, word.start() - _LOOK_BACK) : word.start()].rstrip(b" \"'`(*")
    return bool(before) and before[-1:] not in b".!?\n"


def _spelled(context: Context, tokens: np.ndarray) -> list[bytes]:
    distinct, which = np.unique(tokens, return_inverse=True)
    pieces = Pieces(context.vocabulary)
    spelled = [pieces[int(token)] if token >= 0 else b"" for token in distinct]
    return [spelled[i] or b"\n" for i in which]
